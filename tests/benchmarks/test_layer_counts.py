"""Launches, bytes and operations of layers of real sizes; of transformers' own they are known."""

import importlib.metadata

import pytest
import torch
from count_kernels import ELEMENTWISE, FUSED, GEMM, Totals
from layer_counts import Setting, count, launches, settings
from layer_parts import QUICK_WORK, TEXT, VISION, WORK, meta_part
from layer_variants import ADDED, FORWARD, PASSES, RECOMPUTED, STORED

D, F, KV = 1536, 8960, 256
"""Widths of the 2B: hidden states, MLP, and keys and values together."""
KNOWN = {
    Setting("2B", "all weights", TEXT): (40, 116, 154, 166),
    Setting("2B", "LoRA", TEXT): (82, 207, 284, 298),
    Setting("2B", "LoRA on 4 bits", TEXT): (103, 249, 347, 361),
    Setting("2B", "all weights", VISION): (26, 68, 92, 104),
    Setting("2.5-3B", "all weights", VISION): (40, 114, 152, 164),
}
"""Launches of transformers' modules in PASSES."""
TESTED = {"torch": "2.13.0", "transformers": "5.23.0"}
"""The versions of constraints.txt, with which the numbers are exactly these."""


def totals(setting: Setting, name: str, variant: str = "transformers") -> Totals:
    found, part = launches(setting, variant, name)
    return Totals.of(found, part.tokens, part.width)


@pytest.mark.parametrize("setting", KNOWN, ids=lambda setting: " ".join(setting))
def test_launches_of_transformers_layers(setting):
    numbers = tuple(totals(setting, name).launches for name in PASSES)
    versions = {each: importlib.metadata.version(each).partition("+")[0] for each in TESTED}
    off = 0 if versions == TESTED else 0.1
    assert numbers == pytest.approx(KNOWN[setting], rel=off, abs=0)


MOST = {
    Setting("2B", "all weights", TEXT): 39,
    Setting("2B", "all weights", VISION): 35,
    Setting("2.5-3B", "all weights", VISION): 36,
    Setting("3-4B", "all weights", TEXT): 38,  # sums for two norms of heads, none for biases
    Setting("3-2B", "all weights", VISION): 35,
    Setting("2B", "LoRA", TEXT): 69,
    Setting("2B", "LoRA on 4 bits", TEXT): 77,  # LoRA, and 8 of dequantisation
}
"""Launches that a layer of ours may take, with recomputation and backward."""


@pytest.mark.parametrize("setting", MOST, ids=lambda setting: " ".join(setting))
def test_launches_of_our_layers(setting):
    ours = totals(setting, RECOMPUTED, "ours")
    assert ours.launches <= MOST[setting]
    assert ours.alone == 0, "no kernel does only element-wise work on all tokens"
    theirs = totals(setting, RECOMPUTED)
    share = 0.31 if setting.model == "3-2B" else 0.3  # its GELU is one kernel of PyTorch's, too
    assert ours.nbytes < share * theirs.nbytes
    assert ours.flop <= theirs.flop, "what no gradient needs is not computed again"


def test_a_text_layer_moves_what_its_operations_must():
    setting = Setting("2B", "all weights", TEXT)
    stored = totals(setting, STORED)
    assert stored.nbytes == pytest.approx(5.07e9, rel=0.02)
    assert totals(setting, RECOMPUTED).nbytes == pytest.approx(6.60e9, rel=0.02)

    # A product for each weight matrix; backward another for its gradient and one for its input's.
    assert (stored.kinds[GEMM][0], stored.kinds[ELEMENTWISE][0] > 50) == (21, True)
    per_token = 2 * D * D + 2 * D * KV + 3 * D * F
    assert totals(setting, FORWARD).flop == 2 * 6144 * per_token
    assert stored.flop == 3 * 2 * 6144 * per_token

    # In a step's later packs each gradient is read, as is what is added to it, and written.
    added = totals(setting, ADDED)
    weights = per_token + D + 2 * KV + 2 * D
    assert added.nbytes - totals(setting, RECOMPUTED).nbytes == 3 * 2 * weights


def test_ligers_kernels_take_the_place_of_operators():
    pytest.importorskip("liger_kernel")
    setting = Setting("2B", "all weights", TEXT)
    ours, ligers = (totals(setting, FORWARD, name) for name in ("transformers", "liger"))
    assert ligers.kinds[FUSED][0] == 4  # two norms, a rotation, a SwiGLU
    assert ligers.launches < ours.launches / 2 and ligers.nbytes < ours.nbytes / 2
    assert ligers.kinds[GEMM] == ours.kinds[GEMM]


@pytest.mark.parametrize("work", [WORK, QUICK_WORK])
def test_attention_counts_the_pairs_that_see_each_other(work):
    part = meta_part("tiny", TEXT, "all weights", work)
    (prompt, _), (completion, *_), group = (
        work.prompts,
        work.completions,
        len(work.completions) // 2,
    )
    own = completion - 1
    mask = torch.ones(prompt + own, prompt + own, dtype=torch.bool).tril()
    pairs = 2 * int(mask[:prompt].sum()) + 2 * group * int(mask[prompt:].sum())
    assert part.tokens == 2 * (prompt + group * own)
    assert part.attention_flop == 4 * part.heads * part.angles[0].shape[-1] * pairs


def test_a_vision_block_sees_images_or_windows():
    whole, windows = (meta_part(name, VISION, "all weights") for name in ("2B", "2.5-3B"))
    assert whole.tokens == windows.tokens == sum(WORK.patches)
    assert (whole.longest, windows.longest) == (2048, 64)
    assert whole.attention_flop == 4 * 16 * 80 * 2 * 2048**2
    assert windows.attention_flop * 32 == whole.attention_flop


def test_a_variant_that_cannot_be_counted_is_left_out_with_a_reason(capsys):
    results = count(["tiny"], ["transformers", "compiled"], QUICK_WORK)
    assert [row["variant"] for row in results["rows"]] == ["transformers"] * len(settings(["tiny"]))
    assert set(results["skipped"]) == {"compiled"}
    printed = capsys.readouterr().out
    assert "skipped: compiled" in printed and "120 tokens, 120 patches" in printed


def test_the_7b_has_the_2bs_vision_block():
    assert Setting("7B", "all weights", VISION) not in settings(["2B", "7B"])
    assert Setting("7B", "all weights", VISION) in settings(["7B"])
    first, second = (meta_part(name, VISION, "all weights").layer for name in ("2B", "7B"))
    assert [p.shape for p in first.parameters()] == [p.shape for p in second.parameters()]
