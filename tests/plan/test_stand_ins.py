"""Layers that a plan has in the place of peft's allocate what peft's do; a plan imports no peft."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from mr1_fast.config import TrainConfig
from mr1_fast.model.block_parts import text_block
from mr1_fast.model.load import with_lora
from mr1_fast.plan import meta_model
from mr1_fast.plan.layers import STORED, trace_part
from mr1_fast.plan.plan import make_plan
from mr1_fast.plan.stand_ins import FourBitLinear, LoraLinear, use_four_bits, use_lora

from .real_steps import small_config

SETTINGS = {
    "fp32, stored": dict(dtype="float32", recompute="none"),
    "bf16, recomputed": dict(dtype="bfloat16", recompute="all"),
    "4 bits, recomputed": dict(dtype="bfloat16", recompute="all", load_in_4bit=True),
    "4 bits, stored, rank 8": dict(
        dtype="bfloat16", load_in_4bit=True, recompute="none", lora_rank=8
    ),
}


def use_peft(model: nn.Module, rank: int) -> None:
    """Put peft's own layers into a model, in the place of `use_lora`."""
    adapted = with_lora(model, TrainConfig(lora=True, lora_rank=rank))
    assert adapted.get_base_model() is model


@pytest.fixture
def plan_anew(monkeypatch):
    """A plan in which nothing is kept of earlier models; `use_lora` is what puts adapters in."""

    def plan(config: TrainConfig, use_lora):
        monkeypatch.setattr(meta_model, "use_lora", use_lora)
        meta_model._build.cache_clear()
        return make_plan(config, small_config())

    yield plan
    meta_model._build.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_equals_that_with_pefts_layers(name, device, plan_anew):
    config = TrainConfig(lora=True, device=device, prompts_per_step=4, **SETTINGS[name])
    assert plan_anew(config, meta_model.use_lora) == plan_anew(config, use_peft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_4_bits", [False, True])
def test_a_lora_layer_allocates_what_pefts_does(dtype, in_4_bits):
    config, traced = TrainConfig(lora=True, lora_rank=8), []

    def linear() -> nn.Linear:
        layer = nn.Linear(96, 160, device="meta", dtype=dtype)
        return FourBitLinear(layer) if in_4_bits else layer

    holder = nn.Module()
    holder.language_model = nn.Module()
    holder.language_model.mlp = nn.ModuleDict({"up_proj": linear()})
    holder.config = small_config()
    ours = LoraLinear(linear(), rank=8).requires_grad_(False)
    for part in (ours.lora_A, ours.lora_B):
        part.requires_grad_(True)
    pefts = with_lora(holder, config).get_base_model().language_model.mlp["up_proj"]
    for layer in (ours, pefts):
        x = torch.empty(50, 96, device="meta", dtype=dtype)
        traced.append(trace_part(layer, layer, (x,), "cpu", STORED))
    assert traced[0] == traced[1]
    assert traced[0].gradients == 4 * 8 * (96 + 160)


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_fused_layers_know_them_as_they_know_the_packages_own(in_4_bits):
    """Adapters and 4-bit weights of q, k, v, o, gate, up and down, which a plan then traces."""
    planned, real = (planned_block(in_4_bits, use) for use in (use_lora, use_peft))
    for ours, right in zip(planned.linears, real.linears, strict=True):
        assert ours.four_bits is None or ours.four_bits.dequantise().shape[0] == sum(ours.lengths)
        assert (ours.four_bits is not None) is (right.four_bits is not None) is in_4_bits
        assert ours.lengths == right.lengths and ours.dtype == right.dtype == torch.bfloat16
        assert ours.adapters.scale == right.adapters.scale
        pairs = zip(ours.tensors, right.tensors, strict=True)
        assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def planned_block(in_4_bits: bool, use_adapters):
    """The first text layer of a small model on the meta device, as the fused layers see it."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(small_config(), dtype=torch.bfloat16)
    if in_4_bits:
        use_four_bits(model)
    use_adapters(model, 8)
    return text_block(model.model.language_model.layers[0])


def test_a_plan_imports_neither_peft_nor_bitsandbytes():
    code = """if True:
        import sys
        sys.modules["peft"] = sys.modules["bitsandbytes"] = None  # as if not installed
        from mr1_fast.plan.command import print_plan
        from mr1_fast.plan.settings import parse
        print_plan(parse(["--config", "recipes/qwen2vl_7b_lora_24gb.yaml"]))
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Qwen/Qwen2-VL-7B-Instruct on cuda in bfloat16")
