"""verl's own fused forward functions over our LM heads, from verl's sources.

verl needs ray and much else, its model files do not: they are imported from an unpacked sdist,
without the packages' own `__init__`.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from mr1_fast.integrations import verl as ours
from mr1_fast.model.families import FAMILIES
from mr1_fast.model.tiny import family_processor

from ..data.models import family_model, mixed_examples, plain_inputs, small_text_model

SOURCES = Path(os.environ.get("MR1_FAST_VERL") or Path(__file__).parents[2] / ".verl")
pytestmark = pytest.mark.skipif(
    not (SOURCES / "verl").is_dir(),
    reason=f"no sources of verl in {SOURCES}: CONTRIBUTING.md says how to get them",
)
PACKAGES = ("", ".utils", ".utils.experimental", ".utils.kernel", ".models", ".models.transformers")
RENAMED = {
    "qwen2_vl": "Qwen2VLCausalLMOutputWithPast",
    "qwen3_vl": "Qwen3VLCausalLMOutputWithPast",
    "qwen3_5": "Qwen3_5CausalLMOutputWithPast",
    "glm4v": "Glm4vCausalLMOutputWithPast",
}
"""verl's files → the class that they extend, which newer versions of transformers have dropped."""

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def verl():
    """A function that imports a module of verl by its name below `verl`."""
    with pytest.MonkeyPatch.context() as patch:
        for package in PACKAGES:
            module = ModuleType(f"verl{package}")
            module.__path__ = [str(SOURCES.joinpath(*module.__name__.split(".")))]
            patch.setitem(sys.modules, module.__name__, module)
        for file, name in RENAMED.items():
            theirs = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
            if not hasattr(theirs, name):
                patch.setattr(theirs, name, CausalLMOutputWithPast, raising=False)
        yield lambda name: importlib.import_module(f"verl.{name}")
    for name in [name for name in sys.modules if name == "verl" or name.startswith("verl.")]:
        del sys.modules[name]


def with_images(family: str) -> tuple[torch.nn.Module, dict]:
    """A tiny model of a family, and a prompt with two images."""
    processor = family_processor(FAMILIES[family])
    torch.manual_seed(0)
    inputs = plain_inputs(SimpleNamespace(processor=processor), mixed_examples()[3])
    return family_model(processor, family), inputs


def of_text(model: torch.nn.Module) -> tuple[torch.nn.Module, dict]:
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tiny(name: str, sizes: dict) -> torch.nn.Module:
    """A model with images that gets text alone: its text part has these sizes."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    config = getattr(transformers, f"{name}Config")(text_config=SIZES | sizes)
    vision = config.vision_config
    vision.depth, vision.hidden_size, vision.num_heads, vision.intermediate_size = 1, 32, 2, 48
    vision.out_hidden_size = 32
    return kind(config)


ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
MODELS = {
    "dense_common": lambda: of_text(small_text_model(97)),
    "qwen2_vl": lambda: with_images("qwen2_vl"),
    "qwen2_vl, a Qwen2.5-VL": lambda: with_images("qwen2_5_vl"),
    "qwen3_vl": lambda: with_images("qwen3_vl"),
    "qwen3_5": lambda: of_text(tiny("Qwen3_5", {"num_hidden_layers": 4})),
    "glm4v": lambda: of_text(tiny("Glm4v", {"rope_parameters": ROPE})),
}


def results(forward, model, inputs) -> dict[str, torch.Tensor]:
    """Log-probs, entropy, and the gradient of a sum of both by every parameter."""
    model.zero_grad()
    output = forward(model, **inputs, return_dict=True, temperature=0.7)
    logp, entropy = output.log_probs.flatten(), output.entropy.flatten()  # verl's kernel is flat
    factors = torch.linspace(-1, 1, len(logp))
    (factors * logp + factors.square() * entropy).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"log-probs": logp.detach(), "entropy": entropy.detach(), **gradients}


@pytest.mark.parametrize("backend", ["torch", "liger", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_verls_own_forward_gives_the_same_over_our_head(name, backend, verl, monkeypatch):
    file = verl(f"models.transformers.{name.partition(',')[0]}")
    model, inputs = MODELS[name]()
    if name.startswith(("qwen2_vl", "glm4v")):  # text's position, then time, height and width
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(
            4, *inputs["input_ids"].shape
        )
    expected = results(file.forward_with_torch_backend, model, inputs)

    monkeypatch.setattr(
        verl("utils.experimental.torch_functional"), "FusedLinearForPPO", ours.FusedLinearForPPO
    )
    monkeypatch.setattr(
        verl("utils.kernel.linear_cross_entropy"), "linear_cross_entropy", ours.linear_cross_entropy
    )
    model._verl_fused_kernels_backend = backend
    way = "triton" if backend == "triton" else "torch"
    found = results(getattr(file, f"forward_with_{way}_backend"), model, inputs)
    assert found.keys() == expected.keys() and len(found) > 10
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_the_settings_are_verls(verl):
    theirs = verl("utils.experimental.torch_functional").FusedLinearForPPO
    for kind in (theirs, ours.FusedLinearForPPO):
        assert vars(kind(7, "liger")).items() >= {"chunk_size": 7, "impl_backend": "liger"}.items()
        with pytest.raises(ValueError, match=r"torch.*liger"):
            kind(impl_backend="triton")
