"""Rows of logits with everything a loss needs, and the bound that every result must keep."""

import torch

from mr1_fast import token_logprobs
from mr1_fast.kernels.grpo.reference import grpo_loss_ref

SURROGATES = {
    "clip": {"clip_low": 0.2, "clip_high": 0.28},
    "clip with delta": {"clip_high": 0.28, "delta": 1.6},
    "cispo": {"surrogate": "cispo", "clip_high": 0.25},
    "sapo": {"surrogate": "sapo", "sapo_temperatures": (1.0, 1.25)},
}
EPSILON = torch.finfo(torch.float32).eps


def loss_rows(
    n: int,
    v: int,
    dtype=torch.float32,
    device="cpu",
    *,
    seed: int = 0,
    logits: torch.Tensor | None = None,
    temperature=1.0,
) -> dict[str, torch.Tensor]:
    """Make logits (n, v), targets and the per-row inputs of a loss, some of them at weight 0.

    Targets are likely and unlikely ones, 0 and v−1 among them. Ratios are spread so widely that
    every branch of every surrogate is taken, but not so widely that the loss would be
    ill-conditioned. `logits` replaces the random ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    logits = normal(n, v, scale=4.0).to(dtype) if logits is None else logits.detach().cpu()
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[1::2] = logits.argmax(-1)[1::2]
    targets[:1], targets[2:3] = 0, v - 1
    per_row = dtype if dtype == torch.float64 else torch.float32
    logp = (
        torch.log_softmax(logits.double() / temperature, -1)
        .gather(1, targets[:, None])[:, 0]
        .to(per_row)
    )
    weights = torch.rand(n, generator=generator) + 0.1
    weights[5::7] = 0
    data = {
        "logits": logits,
        "targets": targets,
        "advantages": normal(n),
        "token_weights": weights,
        "old_logp": logp + normal(n, scale=0.4),
        "ref_logp": logp + normal(n, scale=0.5),
        "is_weights": torch.rand(n, generator=generator) * 2,
    }
    return {name: (t.to(per_row) if t.is_floating_point() and name != "logits" else t).to(device)
            for name, t in data.items()}  # fmt: skip


def objective_of(data: dict[str, torch.Tensor], *optional: str) -> dict[str, torch.Tensor]:
    """Return the inputs beside logits, with the named ones of old_logp, ref_logp and is_weights."""
    return {name: data[name] for name in ("targets", "advantages", "token_weights", *optional)}


def double(value):
    """Cast floating-point tensors to fp64, also in a dict."""
    if isinstance(value, dict):
        return {name: double(item) for name, item in value.items()}
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def reference(logits: torch.Tensor, **arguments):
    """Return the results of grpo_loss_ref and the gradient by the logits."""
    logits = logits.detach().requires_grad_()
    result = grpo_loss_ref(logits, **arguments)
    return result, torch.autograd.grad(result.loss, logits)[0]


def logprobs_and_gradients(
    function, logits: torch.Tensor, targets: torch.Tensor, incoming
) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, the gradient of logp alone, and that of both.

    `incoming` holds the incoming gradients of logp and of entropy.
    """
    leaf = logits.detach().clone().requires_grad_()
    logp, entropy = function(leaf, targets, 0.8)
    gradients = [torch.autograd.grad(logp, leaf, incoming[0].to(logp.dtype), retain_graph=True)[0]]
    gradients.append(
        torch.autograd.grad((logp, entropy), leaf, [g.to(logp.dtype) for g in incoming])[0]
    )
    return logp, entropy, *gradients


MASKS = {
    "none": lambda n: torch.ones(n, dtype=torch.bool),
    "all": lambda n: torch.zeros(n, dtype=torch.bool),
    "every other": lambda n: torch.arange(n) % 2 == 1,
    "all but the last": lambda n: torch.arange(n) == n - 1,
}
"""Names → functions that make the rows which count, of n."""


def poisoned(data, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits as a slice of wider ones, and the targets; masked rows hold rubbish."""
    n, v = data["logits"].shape
    wide = data["logits"].new_full((n, v + 3), torch.nan)
    wide[:, :v] = data["logits"]
    wide[~counts] = wide.new_tensor([torch.nan, torch.inf, -torch.inf]).repeat(v + 1)[: v + 3]
    return wide[:, :v], data["targets"].masked_fill(~counts, -100)


def run_logprobs(logits: torch.Tensor, targets: torch.Tensor, **options) -> tuple:
    """Return logp, entropy, and the gradient of both; that of entropy is NaN in masked rows."""
    leaf = logits.detach().requires_grad_()
    results = token_logprobs(leaf, targets, 0.8, **options)
    incoming = torch.linspace(0.5, 2, len(targets)).to(results[0])
    by_entropy = (0.3 - incoming).masked_fill(targets < 0, torch.nan)
    return *results, *torch.autograd.grad(results, leaf, [incoming, by_entropy])


def assert_within_bound(
    ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, name: str, scale: float = 0.0
):
    """Assert |ours − exact| ≤ 2·|eager − exact| + 8 ulps of fp32, as maxima over the tensor.

    The ulps, at the tensor's scale, are for tensors of a few numbers, where eager may be exact by
    luck. `scale` is that of the terms of a sum, where they are larger.
    """
    assert ours.shape == exact.shape
    assert torch.equal(ours.isfinite(), exact.isfinite()), name
    if not exact.numel():
        return
    error, eager_error = ((t.detach().double() - exact).abs().max().item() for t in (ours, eager))
    tiny = 8 * EPSILON * max(exact.abs().max().item(), scale)
    assert error <= 2 * eager_error + tiny, (
        f"{name}: error {error:.3g}, eager's {eager_error:.3g}, {tiny=:.3g}"
    )


def assert_results_within_bound(ours, eager, exact, derivatives: float = 1.0):
    """Assert the bound for every field of GRPOLoss, and that the flags are equal.

    `derivatives` is Σ |dloss/dlogp| over the rows, by which the rounding of logp moves the loss.
    """
    scale = max(1.0, exact.logp.abs().max().item()) if exact.logp.numel() else 0.0
    for name in ("loss", "logp", "entropy", "kl"):
        of_terms = scale * max(1.0, derivatives) if name == "loss" else scale
        assert_within_bound(
            getattr(ours, name), getattr(eager, name), getattr(exact, name), name, of_terms
        )
    for name in ("clipped", "kl_limited"):
        assert torch.equal(getattr(ours, name), getattr(exact, name)), name
