"""The replacements for Liger's functions on logits, compared with Liger's Triton kernels."""

import warnings

import pytest
import torch

from mr1_fast.integrations import liger as ours
from mr1_fast.integrations import warn_once

B, L, V = 3, 3, 37
TOLERANCE = 1e-5
LOSS_TYPES = ["grpo", "dr_grpo", "bnpo", "dapo", "luspo", "cispo", "sapo"]
KINDS = [(loss_type, "token") for loss_type in LOSS_TYPES] + [
    (loss_type, "sequence") for loss_type in LOSS_TYPES[:5]
]
# Settings, and which of mask, old and reference log-probs and ratio are given.
CASES = {
    "defaults": ({}, "mask old ref"),
    "on-policy": (
        {"beta": 0.0, "num_items_in_batch": 23, "max_completion_length": 5},
        "mask ratio:B",
    ),
    "no mask": ({"beta": 0.1, "delta": 1.4, "temperature": 1.3}, "old ref ratio:B1"),
    "corrected KL": (
        {"use_bias_correction_kl": True, "delta": 1.2, "eps_high": 0.25},
        "mask old ref ratio:BL",
    ),
}


@pytest.fixture(scope="module")
def theirs():
    """Liger's module."""
    return pytest.importorskip("liger_kernel.transformers.grpo_loss")


def make_inputs(names: str, device: str, seed: int = 0) -> tuple[torch.Tensor, dict]:
    """Logits (B, L+1, V), and the functions' other arguments by name."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, L + 1, V, generator=generator)
    ids = torch.randint(0, V, (B, L), generator=generator)
    logp = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (logp + 0.3 * torch.randn(B, L, generator=generator) for _ in range(2))
    ratio = 2 * torch.rand(B, L, generator=generator)
    ratios = {"B": ratio[:, 0], "B1": ratio[:, :1], "BL": ratio}
    rest = {
        "old_logp": old if "old" in names else None,
        "ref_logp": ref if "ref" in names else None,
        "completion_ids": ids,
        "advantages": torch.randn(B, generator=generator),
        "completion_mask": (torch.arange(L) < torch.tensor([2, 0, L])[:, None]).long()
        if "mask" in names
        else None,
        "vllm_is_ratio": ratios.get(names.partition("ratio:")[2]),
    }
    return logits.to(device), {
        name: None if v is None else v.contiguous().to(device) for name, v in rest.items()
    }


def results(function, logits, rest, **settings) -> dict[str, torch.Tensor | None]:
    """What the function returns, and the gradient by the logits, by name."""
    leaf = logits.clone().requires_grad_()
    loss, *more = function(leaf * 1, **rest, **settings)
    if settings["reduce"]:
        assert len(more) == 1 and type(more[0]) is list
        more = more[0]
    incoming = torch.linspace(-1, 2, loss.numel(), device=loss.device).view(
        loss.shape
    )  # padding's is not 0
    loss.backward(incoming if loss.ndim else 1.5 * torch.ones_like(loss))
    values = {"loss": loss, "gradient": leaf.grad} | {
        f"metric {i}": value for i, value in enumerate(more)
    }
    return {name: None if value is None else value.detach() for name, value in values.items()}


def assert_close(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        largest, difference = (t.abs().max().item() for t in (value, found[name] - value))
        assert difference <= TOLERANCE * largest, f"{name}: {difference:.2g} of {largest:.2g}"


def both(theirs, loss_type, level, case, device, **settings) -> list[dict]:
    """Results of ours and of Liger's."""
    given, names = CASES[case]
    settings |= given | {"loss_type": loss_type, "importance_sampling_level": level}
    if loss_type in ("cispo", "sapo"):
        settings.pop("delta", None)
    logits, rest = make_inputs(names, device)
    return [results(module.triton_grpo_loss, logits, rest, **settings) for module in (ours, theirs)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("loss_type", "level"),
    [("grpo", "token"), ("grpo", "sequence"), ("cispo", "token"), ("sapo", "token")],
)
def test_the_loss_of_each_token_is_that_of_ligers_kernels(loss_type, level, case, device, theirs):
    assert_close(*both(theirs, loss_type, level, case, device, reduce=False))


@pytest.mark.parametrize("case", ["defaults", "on-policy"])
@pytest.mark.parametrize(
    ("loss_type", "level"), [kind for kind in KINDS if kind != ("luspo", "token")]
)
def test_the_reduced_loss_is_that_of_ligers_kernels(loss_type, level, case, device, theirs):
    assert_close(*both(theirs, loss_type, level, case, device, reduce=True))


def test_luspo_weighs_a_token_by_its_own_sequence(device, theirs):
    """Liger's backward reads weights (B, 1) as (B, L): token t of sequence i gets that of i + t."""
    found, liger = both(theirs, "luspo", "token", "defaults", device, reduce=True)
    wrong = liger.pop("gradient")
    gradient = found.pop("gradient")
    assert_close(found, liger)
    logits, rest = make_inputs(CASES["defaults"][1], device)
    leaf = logits.clone().requires_grad_()
    loss, _, _ = theirs.triton_grpo_loss(leaf * 1, **rest, loss_type="luspo")
    (1.5 * loss * rest["completion_mask"].sum(-1, keepdim=True)).mean().backward()
    assert_close({"gradient": gradient}, {"gradient": leaf.grad})
    # sequence 0 has 2 tokens; its second one gets the weight of sequence 1, whose length counts as
    # 1
    torch.testing.assert_close(2 * wrong[0, 1], gradient[0, 1], rtol=1e-3, atol=1e-7)


def test_fused_selective_log_softmax_is_that_of_ligers_kernel(device, theirs):
    logits, rest = make_inputs("mask", device)
    before = torch.ones(B, 2, dtype=torch.long, device=device)
    ids, mask = (
        torch.cat([before, rest[name]], 1) for name in ("completion_ids", "completion_mask")
    )
    for arguments in ({}, {"mask": mask}, {"mask": mask[:, 2:], "temperature": 1.7}):
        found, expected = (
            m.fused_selective_log_softmax(logits, ids, **arguments) for m in (ours, theirs)
        )
        assert_close({"logp": found}, {"logp": expected})


def test_log_probs_are_those_of_pytorch(device):
    logits, rest = make_inputs("mask", device)
    ids, mask = rest["completion_ids"], rest["completion_mask"]
    expected = (logits.double()[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None])[
        ..., 0
    ] * mask
    assert_close(
        {"logp": ours.fused_selective_log_softmax(logits, ids, mask=mask)},
        {"logp": expected.float()},
    )


def test_vespo_is_ligers_with_one_warning(device, theirs):
    warn_once.cache_clear()
    logits, rest = make_inputs("mask old ref", device)
    settings = {"loss_type": "vespo", "reduce": True, "vespo_k_neg": 2.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [results(ours.triton_grpo_loss, logits, rest, **settings) for _ in range(2)]
    assert len([each for each in caught if "vespo" in str(each.message)]) == 1
    for each in found:
        assert_close(each, results(theirs.triton_grpo_loss, logits, rest, **settings))
