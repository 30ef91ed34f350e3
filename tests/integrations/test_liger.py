"""The drop-in replacement for Liger's loss on hidden states, held against Liger itself in fp32."""

import importlib.util
import inspect
import itertools
import sys
import warnings

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from mr1_fast.integrations import liger as ours
from mr1_fast.integrations import warn_once

pytest.importorskip("liger_kernel")
from liger_kernel import chunked_loss
from liger_kernel.transformers import grpo_loss as theirs

B, T, D, V = 5, 6, 8, 131
TOLERANCE = 1e-5
LOSS_TYPES = ["grpo", "dr_grpo", "bnpo", "dapo", "luspo", "cispo", "sapo"]
KINDS = [(loss_type, "token") for loss_type in LOSS_TYPES] + [
    (loss_type, "sequence") for loss_type in LOSS_TYPES[:5]
]
TYPICAL = {"epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": 9, "temperature": 0.8}
LOGPS = "old_per_token_logps ref_per_token_logps"
# Settings, and the names of the inputs beside the five that must be given.
CASES = {
    "on-policy": ({"beta": 0.0, "use_ref_model": False}, ""),
    "old, reference": ({"beta": 0.07}, LOGPS),
    "reference's hidden states": (
        {"beta": 0.04, "delta": 1.4},
        "old_per_token_logps ref_input ref_weight ref_bias",
    ),
    "reference without bias": ({"beta": 0.1}, "ref_input ref_weight vllm_is_ratio:B"),
    "reference not used": ({"beta": 0.1, "use_ref_model": False}, f"{LOGPS} bias"),
    "ratio (B,)": ({"beta": 0.0, "use_ref_model": False}, "old_per_token_logps vllm_is_ratio:B"),
    "ratio (B, 1)": ({"beta": 0.0, "delta": 1.2}, f"{LOGPS} vllm_is_ratio:B1"),
    "ratio (B, T)": ({"beta": 0.0}, f"{LOGPS} vllm_is_ratio:BT bias"),
    "corrected KL": (
        {"beta": 0.2, "use_bias_correction_kl": True, "delta": 1.3},
        f"{LOGPS} vllm_is_ratio:BT",
    ),
    "corrected KL, on-policy": (
        {"beta": 0.2, "use_bias_correction_kl": True},
        "ref_per_token_logps num_items_in_batch",
    ),
    "frozen head": ({"beta": 0.04}, f"frozen {LOGPS} bias num_items_in_batch"),
}
MASKS = {
    "padded": torch.arange(T) < torch.tensor([4, 0, T, 1, 3])[:, None],
    "holes": torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.6,
    "full or empty": torch.tensor([True, True, False, True, True])[:, None].expand(B, T),
    "a token each": (torch.arange(T) == 2).expand(B, T),
    "nothing": torch.zeros(B, T, dtype=torch.bool),
}


def make_inputs(names: str = "", mask: str = "padded", seed: int = 0) -> dict[str, torch.Tensor]:
    """The inputs that must be given, and those named.

    The second and last advantages are 0, as in groups whose rewards are all equal.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    data = {"_input": normal(B, T, D), "lin_weight": normal(V, D)}
    data["selected_token_ids"] = torch.randint(0, V, (B, T), generator=generator)
    data["attention_mask"], data["advantages"] = MASKS[mask].long(), normal(B)
    data["advantages"][[1, -1]] = 0
    bias = normal(V) * ("bias" in names.split())
    logits = (data["_input"] @ data["lin_weight"].T + bias) / TYPICAL["temperature"]
    logp = logits.log_softmax(-1).gather(-1, data["selected_token_ids"][..., None])[..., 0]
    ratio = torch.rand(B, T, generator=generator) * 2
    optional = {"bias": bias, "ref_bias": bias + normal(V, scale=0.2)}
    # The reference has another width and is near the policy, because k3 would magnify rounding.
    optional["ref_input"] = torch.cat([data["_input"], normal(B, T, 1, scale=0.3)], -1)
    optional["ref_weight"] = torch.cat([data["lin_weight"], normal(V, 1)], -1)
    optional |= {
        f"{name}_per_token_logps": logp + normal(B, T, scale=0.4) for name in ("old", "ref")
    }
    optional |= {
        "vllm_is_ratio:B": ratio[:, 0],
        "vllm_is_ratio:B1": ratio[:, :1],
        "vllm_is_ratio:BT": ratio,
    }
    optional["num_items_in_batch"] = torch.tensor(37)
    data |= {name.partition(":")[0]: optional[name] for name in names.split() if name != "frozen"}
    for name in {"_input", "bias", "lin_weight" if "frozen" not in names else "bias"} & set(data):
        data[name].requires_grad_()
    return data


def run(loss: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradients, by name."""
    inputs = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in inputs.items()
    }
    value, metrics = loss(**inputs)
    assert type(metrics) is tuple
    return results(value, metrics, inputs)


def results(loss, metrics, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    (1.5 * loss).backward()
    gradients = {name: tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}
    return (
        {"loss": loss.detach()}
        | {f"metric {i}": metric.detach() for i, metric in enumerate(metrics)}
        | gradients
    )


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Equal within the tolerance, relative to each tensor's largest value.

    A loss has a few ulps more, since it may be a small sum of large terms.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (
            found[name].shape == value.shape
            and found[name].dtype == torch.float32
            and value.isfinite().all()
        ), name
        largest, difference = (t.abs().max().item() for t in (value, found[name] - value))
        ulps = 4 * torch.finfo(torch.float32).eps if name == "loss" else 0
        assert difference <= TOLERANCE * largest + ulps, (
            f"{name}: {difference:.2g} of {largest:.2g}"
        )


def pair(**settings) -> list[torch.nn.Module]:
    """Ours and Liger's loss with the same settings."""
    kinds = ours.LigerFusedLinearGRPOLoss, chunked_loss.LigerFusedLinearGRPOLoss
    return [kind(**{"compiled": False, "chunk_size": B} | TYPICAL | settings) for kind in kinds]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_loss_metrics_and_gradients_are_ligers(loss_type, level, case):
    settings, names = CASES[case]
    losses = pair(loss_type=loss_type, importance_sampling_level=level, **settings)
    # Liger's luspo counts padding, but in sequences without a token.
    for seed, mask in enumerate(["full or empty", "nothing"] if loss_type == "luspo" else MASKS):
        inputs = make_inputs(names, mask, seed)
        found, expected = (run(loss, inputs) for loss in losses)
        assert_close(found, expected)
        assert ("lin_weight" in found) == ("frozen" not in names)


def test_arguments_and_defaults_are_ligers():
    def arguments(function):
        return [
            (p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()
        ]

    mine, liger = ours.LigerFusedLinearGRPOLoss, chunked_loss.LigerFusedLinearGRPOLoss
    for found, expected in [
        (mine.__init__, liger.__init__),
        (mine.forward, liger.forward),
        (ours.triton_grpo_loss, theirs.triton_grpo_loss),
        (ours.fused_selective_log_softmax, theirs.fused_selective_log_softmax),
    ]:
        assert arguments(found) == arguments(expected)
    assert vars(mine()) == vars(liger())


@pytest.mark.parametrize(
    "edit",
    [
        {"beta": 0.07}, {"beta": 0.0}, {"use_ref_model": False},
        {"epsilon_low": 0.0}, {"epsilon_high": 0.0},
        {"loss_type": "cispo"}, {"loss_type": "dr_grpo", "max_completion_length": 3},
        {"importance_sampling_level": "sequence"},
        {"loss_type": "sapo", "sapo_temperature_pos": 0.5},
        {"loss_type": "sapo", "sapo_temperature_neg": 3.0}, {"temperature": 1.7}, {"delta": 1.1},
        {"use_bias_correction_kl": True},
    ],
    ids=str,
)  # fmt: skip
def test_an_edited_setting_acts_at_the_next_call(edit):
    losses = pair(beta=0.02)
    inputs = make_inputs(LOGPS, "holes", seed=2)
    before = run(losses[0], inputs)
    for loss in losses:
        for name, value in edit.items():
            setattr(loss, name, value)
    after = run(losses[0], inputs)
    assert not torch.equal(before["loss"], after["loss"])
    assert_close(after, run(losses[1], inputs))


def test_what_liger_does_not_take():
    loss, liger = pair(beta=0.07)
    loss.beta, loss.temperature = torch.tensor(loss.beta), torch.tensor(loss.temperature)
    inputs = make_inputs(LOGPS)
    per_token = inputs | {"advantages": inputs["advantages"][:, None].expand(B, T)}
    assert_close(run(loss, per_token), run(liger, inputs))


@pytest.mark.parametrize("num_items", [None, 53, torch.tensor(53)])
def test_tokens_are_counted_over_all_processes(num_items, monkeypatch):
    inputs = make_inputs() | {"num_items_in_batch": num_items}
    losses = pair(beta=0.0, use_ref_model=False)
    alone = losses[1](**inputs)[0].detach()
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tokens, op=None: tokens.add_(29)
    )  # the other has 29
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        found, expected = (loss(**inputs)[0].detach() for loss in losses)
    finally:
        torch.distributed.destroy_process_group()
    assert_close({"loss": found}, {"loss": expected})
    assert abs(found - alone) > 0.05 * abs(alone)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_leaves_out_the_padding_that_liger_adds_up(level):
    inputs = make_inputs(f"{LOGPS} vllm_is_ratio:BT")
    losses = pair(beta=0.1, loss_type="luspo", importance_sampling_level=level)
    found, liger = (run(loss, inputs) for loss in losses)
    counts = inputs["attention_mask"].bool()
    assert liger["_input"][~counts].any() and not found["_input"][~counts].any()
    for same in ("metric 0", "metric 1"):
        assert_close({same: found[same]}, {same: liger[same]})
    # What counts has Liger's gradient.
    assert_close({"_input": found["_input"][counts]}, {"_input": liger["_input"][counts]})


KL = [
    {"beta": 0.0},
    {"beta": 0.07},
    {"beta": 0.2, "use_bias_correction_kl": True},
    {"beta": 0.07, "use_ref_model": False},
]
RATIOS = ("", " vllm_is_ratio:B", " vllm_is_ratio:B1", " vllm_is_ratio:BT")


def without_ligers_padding(inputs: dict, level: str, settings: dict) -> dict:
    """Inputs of luspo whose padding adds nothing to Liger's sum: no ratio, and no distance.

    Per sequence the ratio of the padding is part of the objective, as of the policy term itself.
    """
    padding, inputs = inputs["attention_mask"] == 0, dict(inputs)
    logits = inputs["_input"] @ inputs["lin_weight"].T / settings["temperature"]
    ids = inputs["selected_token_ids"][..., None]
    logp = logits.detach().log_softmax(-1).gather(-1, ids)[..., 0]
    ref = inputs["ref_per_token_logps"]
    inputs["ref_per_token_logps"] = torch.where(padding, logp, ref)
    if level == "token":
        ratio = inputs.get("vllm_is_ratio", torch.ones(B))
        ratio = ratio if ratio.ndim == 2 else ratio[:, None]
        inputs["vllm_is_ratio"] = ratio.masked_fill(padding, 0.0)
    return inputs


@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_every_combination_on_a_padded_batch_is_ligers(loss_type, level):
    table = itertools.product(
        KL, RATIOS, ("padded", "holes"), (None, 1.3), (LOGPS, "ref_per_token_logps")
    )
    for seed, (kl, ratio, mask, delta, logps) in enumerate(table):
        inputs = make_inputs(logps + ratio, mask, seed)
        settings = TYPICAL | kl | {"delta": delta}
        losses = pair(loss_type=loss_type, importance_sampling_level=level, **settings)
        theirs = inputs
        if loss_type == "luspo":
            theirs = without_ligers_padding(inputs, level, settings)
        found, expected = (run(*each) for each in zip(losses, (inputs, theirs), strict=True))
        assert_close(found, expected)


def test_two_references_give_ligers_warning():
    inputs = make_inputs(f"{LOGPS} ref_input ref_weight ref_bias")
    found = []
    for loss in pair(beta=0.04):
        with pytest.warns(UserWarning, match="Both ref_per_token_logps and ref_input") as caught:
            found.append((run(loss, inputs), str(caught[0].message)))
    assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_k3_is_bounded_where_ligers_overflows():
    inputs = make_inputs("ref_per_token_logps")
    inputs["ref_per_token_logps"] += 100
    found, liger = (run(loss, inputs) for loss in pair(beta=0.04))
    assert all(value.isfinite().all() for value in found.values())
    assert not liger["loss"].isfinite() and not liger["lin_weight"].isfinite().all()


@pytest.mark.parametrize("loss_type", ["cispo", "sapo"])
def test_the_sequence_level_of_cispo_and_sapo_is_refused_as_in_liger(loss_type):
    for loss in pair(loss_type=loss_type, importance_sampling_level="sequence"):
        with pytest.raises(ValueError, match="not supported for loss_type="):
            loss(**make_inputs(LOGPS))


# --- without Liger, and what is refused -----------------------------------------------------------


def test_vespo_is_ligers_with_one_warning():
    warn_once.cache_clear()
    loss, liger = pair(loss_type="vespo", beta=0.07, vespo_k_pos=1.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [run(loss, make_inputs(LOGPS)) for _ in range(2)]
    assert len([w for w in caught if "vespo" in str(w.message)]) == 1
    for each in found:
        assert_close(each, run(liger, make_inputs(LOGPS)))


def test_liger_is_needed_for_vespo_alone(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.find_spec("mr1_fast.integrations.liger")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0)  # no reference is asked for where β is 0
    loss(**make_inputs())
    loss.loss_type = "vespo"
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        loss(**make_inputs())
    with pytest.raises(ImportError, match="choose another loss_type"):
        module.triton_grpo_loss(None, None, None, None, None, loss_type="vespo")


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"delta": 0.0}, {}, "delta is 0.0"),
        ({"sapo_temperature_neg": 0.0}, {}, "sapo_temperature_neg is 0.0"),
        ({"loss_type": "gspo"}, {}, "loss_type is 'gspo': choose one of grpo"),
        ({"importance_sampling_level": "group"}, {}, "importance_sampling_level is 'group'"),
        (
            {"loss_type": "dr_grpo", "max_completion_length": None},
            {},
            "pass the limit of the rollout",
        ),
        ({"beta": 0.1}, {}, "pass ref_per_token_logps, or ref_input"),
        (
            {},
            {"vllm_is_ratio": torch.ones(B, 2)},
            r"vllm_is_ratio has shape \(5, 2\): expected \(5,\)",
        ),
        ({}, {"advantages": torch.ones(B + 1)}, r"advantages has shape \(6,\)"),
        ({}, {"attention_mask": torch.ones(B, T + 1)}, "attention_mask have shapes"),
    ],
)
def test_what_is_refused_on_hidden_states(settings, change, message):
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearGRPOLoss(**{"beta": 0.0} | settings)(**make_inputs() | change)
