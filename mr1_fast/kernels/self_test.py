"""A small batch through all kernels at the start of a run, compared with the references.

There are devices on which a Triton kernel compiles, runs, and writes nothing (consumer AMD cards,
unsloth#11614). A run there would train on whatever the memory held.
"""

from dataclasses import fields, is_dataclass, replace

import torch

from ..errors import UserError
from .adamw.reference import master_weight
from .adamw.state import Scalars, State
from .adamw.step import adamw_, add_stochastic_
from .decode import linear as decode_linear
from .decode import operations as decode
from .decode import reference as decode_reference
from .decode.layer import Adapter, Layer
from .decode.reference import linear_ref
from .four_bit.weight import FourBitWeight
from .grpo.linear import linear_grpo_loss_with_gradient
from .grpo.objective import Objective, RowResults
from .grpo.reference import grpo_loss_ref
from .grpo.rows import row_grpo, row_logprobs, row_logprobs_backward, scale_
from .layers import operations as layers
from .layers import reference as layers_reference
from .layers.head_norms import HeadNorms


def self_test(device: torch.device, four_bits: bool = False) -> None:
    """Raise UserError if a kernel on `device` gives other numbers than the reference on the CPU.

    four_bits: whether the kernels that read weights in 4 bits are among them.
    """
    try:
        worst = _largest_errors(device, four_bits)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"device {device} cannot run the kernels ({error}): use another, or --device cpu."
        ) from error
    for name, error in worst.items():
        if not error < 1e-2:
            raise UserError(
                f"device {device} computes {name} wrong in the self-test (error {error:.2g}): its "
                "driver or Triton does not run these kernels; use another device, or --device cpu."
            )


def _largest_errors(device: torch.device, four_bits: bool) -> dict[str, float]:
    """Return the largest error of each result, relative to its largest value."""
    pairs = {
        **_loss_pairs(device),
        "the weight gradient over chunks": _weight_gradients(device, fp32_accumulation=False),
        "its sum in fp32": _weight_gradients(device, fp32_accumulation=True),
        **_optimizer_pairs(device),
        **_decode_pairs(device),
        **_decode_linear_pairs(device, four_bits),
        **_layer_pairs(device),
    }
    return {
        name: _relative_error(ours.cpu().float(), right.float())
        for name, (ours, right) in pairs.items()
    }


def _loss_pairs(device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Compute (ours, right) of the row operations, on bf16 logits.

    A row has several programs on a GPU, which wait for each other.
    """
    generator = torch.Generator().manual_seed(0)
    n, v = 6, 10_000
    logits = torch.randn(n, v, generator=generator).bfloat16()
    targets = torch.randint(v, (n,), generator=generator)
    advantages, shift, weights = torch.randn(3, n, generator=generator)
    old_logp, ref_logp, weights = -10 + shift, -9.5 - shift, weights.abs()

    exact = logits.float().requires_grad_()
    settings = dict(
        beta=torch.tensor(0.1), temperature=torch.tensor(0.9), old_logp=old_logp, ref_logp=ref_logp
    )
    expected = grpo_loss_ref(exact, targets, advantages, weights, **settings)
    expected.loss.backward()

    objective = Objective(
        advantages=advantages.to(device),
        token_weights=weights.to(device),
        **{name: value.to(device) for name, value in settings.items()},
    )
    on_device, targets = logits.to(device), targets.to(device)
    results, gradient = RowResults.empty(on_device), torch.full_like(on_device, torch.nan)
    row_grpo(on_device, targets, objective, results, gradient)

    temperature = objective.temperature
    logp, *rest = row_logprobs(on_device, targets, temperature)
    by_logp, zero = torch.full_like(on_device, torch.nan), torch.zeros(n, device=device)
    row_logprobs_backward(on_device, targets, temperature, *rest, zero + 1, zero, by_logp)
    scale_(by_logp, temperature)
    onehot = torch.nn.functional.one_hot(targets.cpu(), v)
    p = torch.softmax(exact.detach() / settings["temperature"], -1)

    return {
        "the loss": (results.loss.sum(), expected.loss),
        "log-probabilities": (results.logp, expected.logp),
        "entropy": (results.entropy, expected.entropy),
        "KL": (results.kl, expected.kl),
        "clipping": (results.clipped, expected.clipped),
        "the gradient of the loss": (gradient, exact.grad),
        "log-probabilities alone": (logp, expected.logp),
        "the gradient of log-probabilities": (by_logp, onehot - p),
    }


def _weight_gradients(
    device: torch.device, fp32_accumulation: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute dweight of a bf16 head over two chunks, and by autograd on the CPU in fp32."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = ((torch.randn(n, 64, generator=generator) / 4).bfloat16() for n in (12, 1000))
    targets, ones = torch.randint(1000, (12,), generator=generator), torch.ones(12)
    objective = Objective(
        advantages=ones.to(device),
        token_weights=ones.to(device),
        beta=torch.tensor(0.0, device=device),
        temperature=torch.tensor(1.0, device=device),
        surrogate="cispo",
    )
    on_device = weight.to(device).requires_grad_()
    inputs = hidden.to(device), on_device, None, targets.to(device), objective
    result = linear_grpo_loss_with_gradient(
        *inputs, chunk_bytes=6 * 2000, fp32_accumulation=fp32_accumulation
    )
    result.loss.backward()
    exact = weight.detach().float().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.float() @ exact.T, targets, reduction="sum").backward()
    return on_device.grad, exact.grad


def _optimizer_pairs(device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Compute a first step of AdamW with 8-bit states, and a sum of gradients.

    Before the first step no state has been rounded, so it equals PyTorch's.
    """
    generator = torch.Generator().manual_seed(2)
    weight, gradient, other = (torch.randn(1536, generator=generator).bfloat16() for _ in range(3))
    exact, half = weight.float().requires_grad_(), torch.tensor(0.5)
    exact.grad = gradient.float() / 2
    torch.optim.AdamW([exact], lr=0.1, weight_decay=0.0).step()
    there, total = weight.to(device, copy=True), gradient.to(device, copy=True)
    state = State.zeros(there, remainder=True)
    adamw_(
        there,
        gradient.to(device),
        state,
        Scalars.at(1, 0.1, (0.9, 0.999), 1e-8, 0.0),
        (1, 2),
        half.to(device),
    )
    add_stochastic_(total, other.to(device), seed=3)
    moved = master_weight(there, state.remainder).cpu() - weight
    return {
        "the optimizer's step": (moved, exact.detach() - weight),
        "accumulated gradients": (total, gradient.float() + other.float()),
    }


def _decode_pairs(device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Compute what a rollout's step does: three rows, of which two share a prefix of 5 tokens."""
    generator = torch.Generator().manual_seed(4)
    q, k, v, keys, values = (
        torch.randn(n, h, 32, generator=generator)
        for n, h in ((3, 4), (3, 2), (3, 2), (20, 2), (20, 2))
    )
    angles = torch.randn(3, 32, generator=generator)
    spans = torch.tensor([[0, 5, 6, 2], [0, 5, 10, 1], [0, 0, 14, 4]], dtype=torch.int32)
    logits, uniform = torch.randn(3, 10_000, generator=generator), torch.tensor([0.1, 0.5, 0.9])
    attention = [t.bfloat16() for t in (q, k, v, angles.cos(), angles.sin(), keys, values)]
    logits = logits.bfloat16()
    q_weight, k_weight = (torch.rand(2, 32, generator=generator) + 0.5).bfloat16()
    pairs = {
        "a rollout's draw": (
            decode.sample(logits.to(device), uniform.to(device), 0.9, (7,))[1],
            decode_reference.sample_ref(logits, uniform, 0.9, (7,))[1],
        )
    }
    for name, weights in (("attention", None), ("attention of normed heads", (q_weight, k_weight))):
        ours, right = (
            [t.to(device, copy=True) for t in attention],
            [t.to(torch.float32, copy=True) for t in attention],
        )
        pairs[f"a rollout's {name}"] = (
            decode.attend(*ours, spans.to(device), 0.2, _head_norms(weights, ours[0])),
            decode_reference.attend_ref(*right, spans, 0.2, _head_norms(weights, right[0])),
        )
    return pairs


def _head_norms(
    weights: tuple[torch.Tensor, torch.Tensor] | None, like: torch.Tensor
) -> HeadNorms | None:
    """Make the norms of heads with these weights, in the dtype and on the device of `like`."""
    return weights and HeadNorms(*(weight.to(like) for weight in weights), 1e-6)


def _decode_linear_pairs(
    device: torch.device, four_bits: bool
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Compute a rollout's linear layers, of which one has an adapter and one is in 4 bits."""
    generator = torch.Generator().manual_seed(6)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, weights = random(3, 128).bfloat16(), [random(48, 128).bfloat16() for _ in range(2)]
    adapter = Adapter(random(8, 128), random(48, 8), 0.5)
    gate, up = Layer(weights[0]), Layer(weights[1], None, adapter)
    calls = {"gating": ("swiglu", gate, up), "product in parts": ("linear_parts", up)}
    if four_bits:
        numbers = (torch.randint(256, (n,), generator=generator) for n in (48 * 64, 48 * 2))
        packed, scales = (each.to(torch.uint8) for each in numbers)
        second = random(256).abs(), random(1).abs(), random(1)[0].abs(), 256
        small = FourBitWeight(packed, random(16), scales, (48, 128), 64, *second)
        calls["product in 4 bits"] = "linear_parts", Layer(small, None, adapter)
        calls["gating in 4 bits"] = "swiglu", Layer(small), Layer(small, None, adapter)

    pairs = {}
    for name, (operation, *given) in calls.items():
        ours = getattr(decode_linear, operation)(x.to(device), *_moved(given, device))
        ours = ours if ours.ndim == 2 else ours.sum(0)
        gate, up = (linear_ref(x, layer).float() for layer in (given[0], given[-1]))
        right = torch.nn.functional.silu(gate) * up if operation == "swiglu" else up
        pairs[f"a rollout's {name}"] = ours, right
    return pairs


def _moved(layers: list[Layer], device: torch.device) -> list[Layer]:
    """Move the tensors of layers, and of what they consist of, to a device."""

    def move(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if is_dataclass(value):
            return replace(value, **{f.name: move(getattr(value, f.name)) for f in fields(value)})
        return value

    return [move(layer) for layer in layers]


def _layer_pairs(device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Compute a layer's norms, rotation and gating of 6 tokens, forward and backward, in bf16."""
    generator = torch.Generator().manual_seed(5)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(6, *shape, generator=generator).bfloat16()

    x, update, gradient, gate_up = rows(96), rows(96), rows(96), rows(192)
    qkv, cos, sin, bias = rows(160), rows(32), rows(32), rows(160)[0]
    q, k, v, weights = rows(3, 32), rows(1, 32), rows(1, 32), rows(32)[:2]
    calls = {
        "norm": ("norm", x, update[0], None, 1e-6),
        "addition and norm": ("add_norm", x, update, gradient[0], update[0], 1e-6),
        "gradient of a norm": (
            *("norm_backward", gradient, update, x, update[0], gradient[0]),
            *(1e-6, True, True),
        ),
        "rotation": ("rotary", qkv, bias, cos, sin, 3, 1),
        "gradient of a rotation": ("rotary_backward", q, k, v, cos, sin),
        "rotation of normed heads": ("norm_rotary", qkv, *weights, 1e-6, cos, sin, 3, 1),
        "gradient of normed heads": (
            *("norm_rotary_backward", q, k, v, qkv, *weights),
            *(1e-6, cos, sin, True),
        ),
        "gating": ("silu_mul", gate_up, gate_up[0]),
        "gradient of gating": ("silu_mul_backward", gradient, gate_up, gate_up[0]),
        **{f"{kind} GELU": ("gelu", x, kind) for kind in layers.GELUS},
        **{
            f"gradient of a {kind} GELU": ("gelu_backward", gradient, x, kind)
            for kind in layers.GELUS
        },
    }
    parts = torch.randn(70, 2, 96, generator=generator)
    summed = layers.norm_gradients(parts.to(device), x[0].to(device))
    pairs = {"a layer's sums of parts": (summed, parts.sum(0))}
    for name, (operation, *arguments) in calls.items():
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        ours = getattr(layers, operation)(*there)
        right = getattr(layers_reference, f"{operation}_ref")(*arguments)
        pairs[f"a layer's {name}"] = _flat(ours), _flat(right)
    return pairs


def _flat(results: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return all results in one row; those in fp32 are sums in parts, of which it is the total."""
    results = results if isinstance(results, tuple) else (results,)
    totals = (x.sum(0) if x.dtype == torch.float32 else x.float() for x in results)
    return torch.cat([x.flatten() for x in totals])


def _relative_error(ours: torch.Tensor, right: torch.Tensor) -> float:
    return ((ours - right).abs().max() / right.abs().max().clamp(min=1e-6)).item()
