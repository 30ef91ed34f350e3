"""The replacements for Liger's functions on logits, compared with Liger's PyTorch in fp64.

Liger's Triton kernels need a GPU or Triton's interpreter: see tests/triton/test_liger_triton.py.
"""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from mr1_fast.integrations import liger as ours
from mr1_fast.kernels.grpo import operators

pytest.importorskip("liger_kernel")
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

from .test_liger import (
    CASES,
    KINDS,
    LOGPS,
    MASKS,
    TYPICAL,
    B,
    T,
    V,
    assert_close,
    make_inputs,
    results,
)


def on_logits(names: str = "", mask: str = "padded", seed: int = 0) -> tuple[torch.Tensor, dict]:
    """Logits (B, T+1, V), and triton_grpo_loss' other tensors; ids of masked tokens are invalid."""
    data = make_inputs(names, mask, seed)
    logits = torch.nn.functional.linear(
        data["_input"], data["lin_weight"], data.get("bias")
    ).detach()
    return torch.cat([logits, torch.full((B, 1, V), 3.0)], 1), {
        "old_logp": data.get("old_per_token_logps"),
        "ref_logp": data.get("ref_per_token_logps"),
        "completion_ids": data["selected_token_ids"].masked_fill(data["attention_mask"] == 0, -100),
        "completion_mask": data["attention_mask"],
        "advantages": data["advantages"],
        "vllm_is_ratio": data.get("vllm_is_ratio"),
    }


def ligers_pytorch(logits, rest, level, **settings) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradient of the logits by Liger's PyTorch, in fp64."""
    leaf = logits.double().requires_grad_()
    logp = (leaf[:, :-1] / TYPICAL["temperature"]).log_softmax(-1)
    logp = logp.gather(-1, rest["completion_ids"].clamp(min=0)[..., None])[..., 0]
    mask, ratio = rest["completion_mask"], rest["vllm_is_ratio"]
    if ratio is not None and ratio.ndim == 1:
        ratio = ratio[:, None]
    loss, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp,
        mask,
        rest["advantages"],
        mask,
        rest["ref_logp"],
        rest["old_logp"],
        importance_sampling_level=level,
        vllm_is_ratio=ratio,
        **settings,
    )
    return {name: value.float() for name, value in results(loss, metrics, {"logits": leaf}).items()}


@pytest.mark.parametrize(
    "case", [c for c, (settings, names) in CASES.items() if "ref_input" not in names]
)
@pytest.mark.parametrize(
    ("loss_type", "level"), [kind for kind in KINDS if kind != ("luspo", "sequence")]
)
def test_the_loss_on_logits_is_ligers(loss_type, level, case):
    settings, names = CASES[case]
    left_out = {"use_ref_model"} | ({"delta"} if loss_type in ("cispo", "sapo") else set())
    settings = {name: value for name, value in settings.items() if name not in left_out}
    settings |= {"loss_type": loss_type, "max_completion_length": 9}
    for seed, mask in enumerate(["full or empty"] if loss_type == "luspo" else MASKS):
        logits, rest = on_logits(names, mask, seed)
        expected = ligers_pytorch(
            logits, rest, level, epsilon_low=0.2, epsilon_high=0.28, **settings
        )
        for inplace in (True, False):
            leaf = logits.clone().requires_grad_()
            loss, metrics = ours.triton_grpo_loss(
                leaf * 1, **rest, **settings, temperature=TYPICAL["temperature"], eps_high=0.28,
                inplace=inplace, reduce=True, importance_sampling_level=level,
            )  # fmt: skip
            assert type(metrics) is list
            assert_close(results(loss, metrics, {"logits": leaf}), expected)


def test_without_reduction_each_token_has_its_loss():
    logits, rest = on_logits(LOGPS)
    leaf, again = logits.clone().requires_grad_(), logits.requires_grad_()
    whole, metrics = ours.triton_grpo_loss(leaf, **rest, inplace=False, reduce=True)
    values = ours.triton_grpo_loss(again, **rest, inplace=False)
    mask = rest["completion_mask"]
    assert all(value.dtype == torch.float32 and not value[mask == 0].any() for value in values)
    loss, *means = (value.sum() / mask.sum() for value in values)
    assert_close(results(loss, means, {"logits": again}), results(whole, metrics, {"logits": leaf}))
    assert ours.triton_grpo_loss(logits, **rest, beta=0.0)[1] is None


def test_the_backward_not_the_forward_overwrites_the_logits():
    logits, rest = on_logits(LOGPS)
    leaf = logits.clone().requires_grad_()
    buffer = leaf * 1
    seen = []
    buffer.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss, _ = ours.triton_grpo_loss(buffer, **rest, reduce=True)
    assert torch.equal(buffer, logits)
    loss.backward(retain_graph=True)
    assert torch.equal(buffer, leaf.grad) and leaf.grad.any()
    assert seen == [buffer.data_ptr()]  # no second tensor of this size
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_whoever_else_needs_the_logits_is_told():
    logits, rest = on_logits(LOGPS)
    squashed = logits.requires_grad_().tanh()  # needs its output for its own backward
    loss, _ = ours.triton_grpo_loss(squashed, **rest, reduce=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_slice_of_longer_logits_is_taken_as_it_is(inplace):
    logits, rest = on_logits(LOGPS)
    leaf = logits.clone().requires_grad_()
    ours.triton_grpo_loss(leaf, **rest, inplace=False)[0].sum().backward()
    before = torch.cat([torch.randn(B, 3, V), logits], 1)
    full = before.clone().requires_grad_()
    kept = full * 1
    loss, _, _ = ours.triton_grpo_loss(kept[:, -T - 1 :], **rest, inplace=inplace)
    loss.sum().backward()
    assert torch.equal(full.grad[:, 3:], leaf.grad) and not full.grad[:, :3].any()
    assert torch.equal(kept[:, :3], before[:, :3])
    assert torch.equal(kept[:, 3:], leaf.grad if inplace else logits)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("inplace", [True, False])
def test_masked_logits_and_those_of_the_last_position_may_hold_anything(inplace, level):
    logits, rest = on_logits(LOGPS)
    mask = torch.nn.functional.pad(rest["completion_mask"], (0, 1)) != 0
    ids = torch.cat([torch.zeros(B, 1, dtype=torch.int64), rest["completion_ids"]], 1)
    found = []
    for values in (logits, logits.masked_fill(~mask[..., None], torch.nan)):
        leaf = values.clone().requires_grad_()
        loss, metrics = ours.triton_grpo_loss(
            leaf * 1, **rest, inplace=inplace, reduce=True, importance_sampling_level=level
        )
        logp = ours.fused_selective_log_softmax(values, ids, mask=rest["completion_mask"])
        found.append((loss, *metrics, logp, *torch.autograd.grad(loss, leaf)))
    assert all(map(torch.equal, *found))
    assert found[0][-1][mask].any() and not found[0][-1][~mask].any()


def test_fused_selective_log_softmax_takes_the_last_ids_and_leaves_out_the_last_logits():
    logits, rest = on_logits()
    mask = torch.cat([torch.ones(B, 2), rest["completion_mask"]], 1)
    ids = torch.cat([torch.full((B, 2), V + 7), rest["completion_ids"]], 1)
    expected = (
        (logits.double()[:, :-1] / 0.9)
        .log_softmax(-1)
        .gather(-1, ids[:, 2:].clamp(min=0)[..., None])[..., 0]
    )
    found = ours.fused_selective_log_softmax(logits.requires_grad_(), ids, mask=mask)
    assert not found.requires_grad
    assert_close({"logp": found}, {"logp": (expected * mask[:, 2:]).float()})
    unmasked = ours.fused_selective_log_softmax(
        logits.bfloat16().repeat(1, 2, 1)[:, T + 1 :], ids.clamp(min=0)
    )
    torch.testing.assert_close(unmasked, expected.float(), atol=0.1, rtol=0)


def test_the_operator_keeps_the_rules_of_torch_library():
    logits, temperature = torch.randn(4, V), torch.tensor(0.9)
    targets = torch.tensor([0, 3, V - 1, 5])
    _, *kept = operators.token_logprobs(logits, targets, temperature)
    arguments = logits, targets, temperature, *kept, torch.randn(4), torch.randn(4)
    torch.library.opcheck(operators.token_logprobs_backward_, arguments)


def test_a_compiled_loss_on_logits_is_the_eager_one_and_a_new_beta_compiles_nothing():
    logits, rest = on_logits(LOGPS)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def loss(leaf, beta):
        return ours.triton_grpo_loss(leaf * 1, **rest, beta=beta, reduce=True)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for beta in torch.tensor([0.04, 0.1]):
        found, expected = [logits.clone().requires_grad_() for _ in range(2)]
        found, expected = (
            results(*compiled(found, beta), {"": found}),
            results(*loss(expected, beta), {"": expected}),
        )
        assert_close(found, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.1, "ref_logp": None}, "ref_logp is None"),
        ({"loss_type": "cispo", "delta": 1.5}, "delta is 1.5, but cispo"),
        ({"loss_type": "gspo"}, "loss_type is 'gspo'"),
        ({"importance_sampling_level": "group"}, "importance_sampling_level is 'group'"),
        ({"loss_type": "sapo", "sapo_temperature_pos": -1.0}, "sapo_temperature"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        (
            {"completion_ids": torch.zeros(B, T + 1, dtype=torch.long), "completion_mask": None},
            "have shapes",
        ),
        ({"completion_mask": None}, "targets holds -100"),
        ({"completion_mask": torch.ones(B, T + 1)}, "mask have shapes"),
    ],
)
def test_what_is_refused_on_logits(change, message):
    logits, rest = on_logits(LOGPS)
    with pytest.raises(ValueError, match=message):
        ours.triton_grpo_loss(logits, **rest | change)
