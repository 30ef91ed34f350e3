"""final/ as others load it, each in a fresh process: transformers, PEFT and TRL."""

import json
import subprocess

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mr1_fast.config import ModelConfig
from mr1_fast.model.load import load_pretrained, make_policy
from mr1_fast.model.processor import ImageTextProcessor
from mr1_fast.model.save import save_pretrained
from mr1_fast.tasks import format_problem
from mr1_fast.types import Example

from ..data.models import own_attention, tiny_policy
from ..data.scripts import run_script
from ..data.torchvision import PREAMBLE, needs_torchvision
from .test_save import adapted

pytest.importorskip("peft")
pytest.importorskip("trl")

BEGIN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from PIL import Image
from safetensors.torch import load_file
FOLDER = Path(sys.argv[0]).parent
FINAL = str(FOLDER / "final")
ours = load_file(FOLDER / "ours.safetensors")
image, text = Image.open(FOLDER / "image.png"), (FOLDER / "text.txt").read_text()
content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
messages = [{"role": "user", "content": content}]

def check_logits(model):
    inputs = {name: ours[name] for name in ("input_ids", "pixel_values", "image_grid_thw")}
    kinds = (inputs["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model.eval()(**inputs, mm_token_type_ids=kinds).logits[0, -1]
    torch.testing.assert_close(logits, ours["logits"], rtol=1e-4, atol=1e-4)

def options(config, **others):
    # One step on two rows, on a CPU, with nothing saved or reported.
    return config(
        output_dir=str(FOLDER / "trl"), max_steps=1, per_device_train_batch_size=2, use_cpu=True,
        bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[], **others
    )
"""
WITHOUT = """
from mr1_fast.model.processor import ImageTextProcessor
from peft import AutoPeftModel
from transformers import AutoModelForImageTextToText, AutoTokenizer, pipeline

check_logits(AutoModelForImageTextToText.from_pretrained(FINAL))
check_logits(AutoPeftModel.from_pretrained(FINAL + "/adapter"))
tokenizer = AutoTokenizer.from_pretrained(FINAL)
written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
count = int((ours["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum())
ids = tokenizer(written.replace("<|image_pad|>", "<|image_pad|>" * count))["input_ids"]
assert ids == ours["input_ids"][0].tolist()

from transformers.utils import is_torchvision_available
if not is_torchvision_available():
    from transformers import AutoImageProcessor, AutoProcessor
    try:
        AutoProcessor.from_pretrained(FINAL)
    except ImportError as error:
        assert "requires the Torchvision library" in str(error), error
    else:
        raise AssertionError("a part of the processor was taken for the whole")
    try:
        images = AutoImageProcessor.from_pretrained(FINAL)
    except ImportError as error:  # transformers before 5.18
        assert "requires the Torchvision library" in str(error), error
    else:
        pixels = images(images=[image], return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, ours["pixel_values"])

pipe = pipeline("image-text-to-text", model=FINAL, processor=ImageTextProcessor.load(FINAL))
answer = pipe(text=messages, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
assert answer and answer == tokenizer.decode(ours["answer"], skip_special_tokens=True)
"""
TRAIN_ON = """
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

prompt, completion = ({"role": r, "content": c} for r, c in (("user", text), ("assistant", "3")))
rows = Dataset.from_list([{"prompt": [prompt], "completion": [completion]}] * 2)
tokenizer = AutoTokenizer.from_pretrained(FINAL)
trainer = SFTTrainer(
    model=FINAL, args=options(SFTConfig), train_dataset=rows, processing_class=tokenizer
)
assert trainer.train().training_loss > 0
"""
WITH = """
from datasets import Dataset
from transformers import AutoProcessor, Qwen2VLProcessor, pipeline
from trl import GRPOConfig, GRPOTrainer

processor = AutoProcessor.from_pretrained(FINAL)
assert type(processor) is Qwen2VLProcessor
assert "Pil" not in type(processor.image_processor).__name__
written = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
encoded = processor(text=[written], images=[image], return_tensors="pt")
assert torch.equal(encoded["input_ids"], ours["input_ids"])
assert torch.equal(encoded["image_grid_thw"], ours["image_grid_thw"])
difference = (encoded["pixel_values"] - ours["pixel_values"]).abs()
print("pixels differ by at most", float(difference.max()), "mean", float(difference.mean()))
assert difference.mean() < 0.005 and difference.max() < 0.1, "in units of the pixels' deviation"

pipe = pipeline("image-text-to-text", model=FINAL)
answer = pipe(text=messages, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
assert answer == processor.tokenizer.decode(ours["answer"], skip_special_tokens=True)

rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}], "image": image}] * 2)
trainer = GRPOTrainer(
    model=FINAL,
    reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
    args=options(GRPOConfig, num_generations=2, max_completion_length=3),
    train_dataset=rows,
    processing_class=processor,
)
before = trainer.model.model.visual.merger.mlp[0].weight.clone()
trainer.train()
assert not torch.equal(before, trainer.model.model.visual.merger.mlp[0].weight), "images count"
"""

QWEN3_VL = """
from mr1_fast.config import ModelConfig
from mr1_fast.model.load import load_pretrained
from mr1_fast.model.processor import ImageTextProcessor
from transformers import AutoProcessor, Qwen3VLProcessor

processor = AutoProcessor.from_pretrained(FINAL)
assert type(processor) is Qwen3VLProcessor
assert "Pil" not in type(processor.image_processor).__name__
written = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
model, mine = load_pretrained(ModelConfig(model=FINAL, device="cpu"))
for index, size in enumerate([(256, 256), (320, 288), (100, 60), (517, 333)]):
    scaled = image.resize(size, Image.Resampling.BICUBIC)
    encoded = processor(text=[written], images=[scaled], return_tensors="pt")
    expected = {name: ours[f"{index}.{name}"] for name in ("ids", "grids", "pixels", "positions")}
    assert torch.equal(encoded["input_ids"][0], expected["ids"])
    assert torch.equal(encoded["image_grid_thw"], expected["grids"])
    positions, _ = model.model.get_rope_index(
        **{n: encoded[n] for n in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
    )
    assert torch.equal(positions[:, 0], expected["positions"])
    difference = (encoded["pixel_values"] - expected["pixels"]).abs()
    print(size, "pixels differ by at most", float(difference.max()), "mean", difference.mean())
    assert difference.max() < 1e-5 or index > 1, "only the order of the arithmetic differs"
    assert difference.mean() < 0.005 and difference.max() < 0.1, "in units of half the range"
    again = mine.image_processor(images=[scaled], return_tensors="pt")["pixel_values"]
    assert torch.equal(again, expected["pixels"]), "the same pixels with torchvision and without"
"""
PUBLISHED = {
    "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
    **{"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2},
    **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
"""What preprocessor_config.json of Qwen3-VL's models says."""


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory):
    """A tiny Qwen3-VL with the published settings of images, and our inputs for several images."""
    root, policy = tmp_path_factory.mktemp("qwen3_vl"), tiny_policy(family="qwen3_vl")
    save_pretrained(policy, root / "base")
    (root / "base" / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    config = ModelConfig(model=str(root / "base"), device="cpu", recompute="none")
    policy = make_policy(*load_pretrained(config), config)
    save_pretrained(policy, root / "final")

    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (9, 13, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(coarse.numpy())
    image.save(root / "image.png")
    found = {}
    for index, size in enumerate([(256, 256), (320, 288), (100, 60), (517, 333)]):
        scaled = image.resize(size, Image.Resampling.BICUBIC)
        example = Example("How many items are there?", (scaled,), "3")
        prompt = policy.encode(example)
        found |= {
            f"{index}.ids": prompt.input_ids,
            f"{index}.grids": prompt.image_grid_thw,
            f"{index}.pixels": prompt.pixel_values,
            f"{index}.positions": prompt.position_ids.contiguous(),
        }
    (root / "text.txt").write_text(format_problem(example))
    save_file(found, root / "ours.safetensors")
    return root


def test_qwen3_vl_has_a_token_for_32_pixels(qwen3_vl):
    ours = load_file(qwen3_vl / "ours.safetensors")
    grids = [ours[f"{index}.grids"].tolist()[0] for index in range(4)]
    assert grids == [[1, 16, 16], [1, 18, 20], [1, 14, 22], [1, 20, 32]]
    assert ours["0.pixels"].shape == (256, 3 * 2 * 16 * 16)
    white = ImageTextProcessor.load(qwen3_vl / "final").image_processor
    (pixels,) = white(images=[Image.new("RGB", (256, 256), "white")])["pixel_values"][None]
    assert (pixels == 1).all(), "mean and deviation are half the range"


@pytest.mark.slow
@pytest.mark.torchvision
@needs_torchvision
def test_qwen3_vl_with_torchvision(qwen3_vl):
    passed(run_script(qwen3_vl / "with.py", PREAMBLE + BEGIN + QWEN3_VL, timeout=200))


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A final folder with the adapter beside the merged model, and our own numbers for a prompt."""
    root, policy = tmp_path_factory.mktemp("elsewhere"), adapted(tiny_folder)
    save_pretrained(policy, root / "final", "both")

    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (9, 13, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(coarse.numpy()).resize((131, 90), Image.Resampling.BICUBIC)
    image.save(root / "image.png")
    example = Example("How many items are there?", (image,), "3")
    (root / "text.txt").write_text(format_problem(example))

    prompt = policy.encode(example)
    names = ("pixel_values", "image_grid_thw")
    inputs = {name: getattr(prompt, name) for name in names} | {"input_ids": prompt.input_ids[None]}
    kinds = (inputs["input_ids"] == policy.processor.image_token_id).int()
    with own_attention(policy), torch.no_grad():
        model = policy.model.eval()
        logits = model(**inputs, mm_token_type_ids=kinds).logits[0, -1]
        tokens = model.generate(
            **inputs, mm_token_type_ids=kinds, max_new_tokens=3, do_sample=False
        )
    answer = tokens[0, len(prompt.input_ids) :].contiguous()
    save_file({**inputs, "logits": logits.clone(), "answer": answer}, root / "ours.safetensors")
    return root


def passed(run: subprocess.CompletedProcess) -> None:
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.slow
def test_without_torchvision(folder):
    passed(run_script(folder / "without.py", BEGIN + WITHOUT + TRAIN_ON, timeout=200))


@pytest.mark.slow
@pytest.mark.torchvision
@needs_torchvision
def test_with_torchvision(folder):
    passed(run_script(folder / "with.py", PREAMBLE + BEGIN + WITH, timeout=200))


def test_what_it_saves_loads_again(processor, tmp_path):
    processor.save_pretrained(tmp_path, "qwen2_vl")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "preprocessor_config.json",
    }
    again = ImageTextProcessor.load(tmp_path)
    assert again.source == str(tmp_path)
    assert again.chat_template == processor.chat_template
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
