"""The two versions of a token's loss, in Triton (`token_loss`) and csrc/grpo_token.h, agree."""

import math

import pytest
import torch
import triton
import triton.language as tl

from mr1_fast.kernels import native
from mr1_fast.kernels.grpo import device_triton, rows_native, rows_triton
from mr1_fast.kernels.grpo.objective import Objective, RowResults

if native.status()[0] is None:
    pytest.skip(f"the native CPU kernels are {native.status()[1]}", allow_module_level=True)

N, HIGH = 256, 1.28
SPECIAL = (math.inf, -math.inf, math.nan, 0.0)
SURROGATES = {
    "clip": ("clip", math.inf),
    "clip, delta above 1 + clip_high": ("clip", 1.6),
    "clip, delta below 1 + clip_high": ("clip", 1.1),
    "cispo": ("cispo", math.inf),
    "sapo": ("sapo", math.inf),
}
OPTIONS = {
    "on-policy": ((), False),
    "old": (("old_logp",), False),
    "reference": (("ref_logp",), True),
    "everything": (("old_logp", "ref_logp", "is_weights"), False),
    "everything, bias-corrected KL": (("old_logp", "ref_logp", "is_weights"), True),
}


def tokens() -> dict[str, torch.Tensor]:
    """Make random tokens, then tokens of special old and reference log-probabilities.

    The special ones come with every sign of the advantage, at weights 0 and 1.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(N, generator=generator)

    logits = torch.stack((normal(3), torch.zeros(N)), 1)
    targets = torch.arange(N) % 2
    logp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    data = {
        "old_logp": logp + normal(0.4),
        "ref_logp": logp + normal(0.5),
        "is_weights": torch.rand(N, generator=generator) * 2,
        "advantages": normal(1),
        "token_weights": torch.rand(N, generator=generator) + 0.1,
    }
    data["token_weights"][5::7] = 0
    data["ref_logp"][100:110] = logp[100:110] + torch.linspace(
        -30, 30, 10
    )  # beyond the bound of k3, too
    data["old_logp"][110:120] = logp[110:120] + torch.linspace(-30, 30, 10)
    data["ref_logp"][120:140] = logp[120:140] + torch.logspace(
        -4, -1, 20
    )  # where exp(d) − d − 1 cancels
    special = [
        (name, value, advantage, weight)
        for name in ("old_logp", "ref_logp", "is_weights")
        for value in SPECIAL
        for advantage in (1.0, -1.0, 0.0)
        for weight in (1.0, 0.0)
    ]
    for row, (name, value, advantage, weight) in enumerate(special, start=140):
        data[name][row], data["advantages"][row], data["token_weights"][row] = (
            value,
            advantage,
            weight,
        )
    return data | {"logits": logits, "targets": targets}


def run(module, data, surrogate: str, options: str) -> tuple[RowResults, torch.Tensor]:
    (name, delta), (optional, bias_corrected_kl) = SURROGATES[surrogate], OPTIONS[options]
    objective = Objective(
        advantages=data["advantages"],
        token_weights=data["token_weights"],
        beta=torch.tensor(0.1),
        temperature=torch.tensor(1.0),
        **{key: data[key] for key in optional},
        surrogate=name,
        clip_high=HIGH - 1,
        delta=delta,
        tau_negative=1.1,
        bias_corrected_kl=bias_corrected_kl,
    )
    results, out = RowResults.empty(data["logits"]), torch.full_like(data["logits"], math.nan)
    module.row_grpo(data["logits"], data["targets"], objective, results, out)
    return results, out


@triton.jit
def _token_losses(
    LOGP, ADVANTAGE, WEIGHT, OLD, REF, IS_WEIGHT,
    beta, clip_low, clip_high, delta, tau_positive, tau_negative,
    LOSS, DERIVATIVE, KL, CLIPPED, KL_LIMITED,
    SURROGATE: tl.constexpr, HAS_REF: tl.constexpr, BIAS_CORRECTED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`token_loss` of all tokens at once: a program each takes the interpreter a minute."""
    i = tl.arange(0, N)
    loss, derivative, kl, clipped, kl_limited = device_triton.token_loss(
        tl.load(LOGP + i), tl.load(ADVANTAGE + i), tl.load(WEIGHT + i), tl.load(OLD + i),
        tl.load(REF + i), tl.load(IS_WEIGHT + i),
        beta, clip_low, clip_high, delta, tau_positive, tau_negative,
        SURROGATE, HAS_REF, BIAS_CORRECTED,
    )  # fmt: skip
    tl.store(LOSS + i, loss)
    tl.store(DERIVATIVE + i, derivative)
    tl.store(KL + i, kl)
    tl.store(CLIPPED + i, clipped.to(tl.uint8))
    tl.store(KL_LIMITED + i, kl_limited.to(tl.uint8))


def token_losses(data, logp, surrogate: str, options: str) -> tuple[RowResults, torch.Tensor]:
    """Triton's results and derivatives by logp at these log-probs."""
    (name, delta), (optional, bias_corrected_kl) = SURROGATES[surrogate], OPTIONS[options]
    old = data["old_logp"] if "old_logp" in optional else logp
    is_weights = data["is_weights"] if "is_weights" in optional else torch.ones(N)
    results, derivative = RowResults.empty(data["logits"]), torch.empty(N)
    results.logp.copy_(logp)
    flags = results.clipped.view(torch.uint8), results.kl_limited.view(torch.uint8)
    per_row = (data["advantages"], data["token_weights"], old, data["ref_logp"], is_weights)
    _token_losses[(1,)](
        logp, *per_row, 0.1, 0.2, HIGH - 1, delta, 1.0, 1.1,
        results.loss, derivative, results.kl, *flags,
        name, "ref_logp" in optional, bias_corrected_kl, N,
    )  # fmt: skip
    return results, derivative


def differences(data, native, triton_, derivative: torch.Tensor) -> list[tuple]:
    """(what, row, native's, Triton's, the token) wherever they are not equal up to a few ulps.

    `derivative` (N,): what each gradient is made of, whose rounding it has: 1 − p may be small.
    """
    (results, gradient), (their_results, their_gradient) = native, triton_
    found = []
    for name in ("loss", "kl", "clipped", "kl_limited", "gradient"):
        ours, theirs = (gradient, their_gradient) if name == "gradient" else (
            getattr(results, name), getattr(their_results, name))  # fmt: skip
        same = ours == theirs
        if ours.dtype != torch.bool:
            slack = 4e-6 * theirs.abs() + 5e-7 * (
                derivative[:, None].clamp(min=1) if name == "gradient" else 1
            )
            same |= ((ours - theirs).abs() <= slack) | (ours.isnan() & theirs.isnan())
        for row in (~same).view(len(ours), -1).any(1).nonzero()[:, 0].tolist():
            token = {key: value[row].tolist() for key, value in data.items()}
            found.append((name, row, ours[row].tolist(), theirs[row].tolist(), token))
    return found


@pytest.fixture(autouse=True)
def tensors_on_a_cpu():
    if torch.cuda.is_available():
        pytest.skip("compared under the interpreter, on CPU tensors")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_loss_of_every_token_is_the_same(surrogate, options):
    data = tokens()
    native = run(rows_native, data, surrogate, options)
    results, derivative = token_losses(data, native[0].logp, surrogate, options)
    derivative = derivative.where(derivative.isfinite(), 0.0)
    onehot = torch.nn.functional.one_hot(data["targets"], 2)
    gradient = derivative[:, None].double() * (onehot - data["logits"].double().softmax(-1))
    found = differences(data, native, (results, gradient.float()), derivative.abs())
    assert not found, "\n".join(map(str, found[:8]))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_kernels_are_the_same_row_by_row(surrogate):
    data = {name: value[96:176] for name, value in tokens().items()}
    native, triton_ = (run(m, data, surrogate, "everything") for m in (rows_native, rows_triton))
    torch.testing.assert_close(native[0].logp, triton_[0].logp, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(native[0].entropy, triton_[0].entropy, rtol=3e-7, atol=3e-7)
    p = data["logits"].softmax(-1).gather(1, 1 - data["targets"][:, None])
    derivative = native[1].gather(1, 1 - data["targets"][:, None]).abs() / p
    found = differences(data, native, triton_, derivative[:, 0])
    assert not found, "\n".join(map(str, found[:8]))


def test_the_tokens_take_every_branch():
    data = tokens()
    results, _ = run(rows_native, data, "clip, delta above 1 + clip_high", "everything")
    ratio, counts = torch.exp(results.logp - data["old_logp"]), data["token_weights"] != 0
    for sign in (1, -1):
        side = counts & (data["advantages"] * sign > 0)
        for low, high in ((0, 0.8), (0.8, HIGH), (HIGH, 1.6), (1.6, math.inf)):
            assert (side & (ratio > low) & (ratio < high)).any()
    assert results.kl_limited.any() and results.clipped.any() and not results.clipped.all()
