"""Settings of the model: which it is, and how it is held in memory."""

from dataclasses import dataclass
from typing import Literal

BUILT_IN = ("tiny", "small", "tiny-qwen2_5vl", "tiny-qwen3vl", "tiny-text")
"""Names of the models that are made without downloads (model/tiny.py)."""


def model_name(text: str) -> str:
    """Return the name that a user means: without blanks around it, a built-in one in lower case."""
    name = text.strip()
    return name.lower() if name.lower() in BUILT_IN else name


@dataclass
class ModelConfig:
    """Which model is used, and how it is held in memory."""

    model: str = "tiny"
    """The model: a built-in one (`tiny` and `small`, which are Qwen2-VL, or `tiny-qwen2_5vl`,
    `tiny-qwen3vl` or `tiny-text`, a Qwen3), a local folder, or a name on the Hugging Face hub such
    as Qwen/Qwen3-VL-2B-Instruct or Qwen/Qwen3-1.7B."""
    lora: bool = False
    """Train LoRA adapters on the language model's linear layers, not all weights; needs peft."""
    lora_rank: int = 32
    """Rank of the LoRA adapters; their scale alpha is twice the rank."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits (nf4); needs --lora and bitsandbytes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and matrix products; `auto` is float32 on a CPU, bfloat16 on CUDA, and
    float16 on cards without bfloat16, such as a T4. In float16 only --lora can be trained, under a
    loss scale."""
    device: str = "auto"
    """Device of the model, such as cpu, cuda or cuda:1; `auto` is cuda if there is a GPU, else
    cpu."""
    recompute: Literal["auto", "all", "none"] = "auto"
    """Which layers run again in the backward pass, which saves memory and takes up to a third more
    time: all of them, which then keep their input alone; none; or as many as the memory plan says
    (auto). The others keep the results of their matrix products and of attention."""
    offload_checkpoints: bool = False
    """Move the stored inputs of layers that are computed again to host memory."""
    fused_layers: bool = True
    """Compute the layers by fused kernels; false takes transformers' own modules."""
    freeze_vision: bool = False
    """Keep the vision tower as it is and train the language model alone, in less time and memory;
    --lora freezes it in any case."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in text and image tokens; a longer one is an error and is never truncated."""
    max_pixels: int = 401_408
    """Largest image as width × height; the default, 401,408 pixels, is 512 image tokens of Qwen2-VL
    and Qwen2.5-VL, and 392 of Qwen3-VL."""
    shrink_images: bool = False
    """Scale images that are larger than --max-pixels down to it, and pad those that are too thin
    for the model, instead of refusing them."""

    def __post_init__(self):
        self.model = model_name(self.model)
