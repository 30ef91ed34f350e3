"""The LM head and the loss in one, for sweep.py: a setting is a tile, which decides a chunk's rows.

Everything else is the library's matrix products. The rows per chunk are those of one setting; the
gradients are compared with fp64 over all rows, for some rows of hidden states and of the head.
"""

from functools import cached_property

import torch
from sweep_checks import Launch, Size, largest
from sweep_kernels import SAMPLE, VOCABULARY, Kernel
from torch import Tensor

from mr1_fast.kernels.grpo.objective import Objective
from mr1_fast.kernels.grpo.reference import grpo_loss_ref, token_logprobs_ref

SLICE = 256
"""Rows of logits that exist in fp64 at a time."""
BOUNDS = {torch.float32: (1e-4, 1e-4), torch.float16: (2e-2, 5e-3), torch.bfloat16: (5e-2, 1e-2)}
"""Bounds of errors in log-probabilities, and of gradients' relative distance from fp64.

Logits are rounded; where fp32 and fp64 round differently, a logit is one step off.
"""


class HeadInputs:
    """Hidden states (N, D), a head (V, D), the loss' other inputs, and results in fp64."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        n, v, d = size
        like = dict(device=device, generator=generator)
        self.hidden = torch.randn(n, d, dtype=dtype, **like)
        self.weight = torch.randn(v, d, dtype=dtype, **like).mul_(2 / d**0.5)
        self.targets = torch.randint(v, (n,), **like)
        temperature = torch.tensor(1.0, device=device)
        logp = [
            token_logprobs_ref(self.hidden[rows] @ self.weight.T, self.targets[rows], temperature)
            for rows in self.slices()
        ]
        self.logp = torch.cat([each for each, _ in logp])
        normal = lambda scale: scale * torch.randn(n, **like)  # noqa: E731
        self.objective = Objective(
            advantages=normal(1.0),
            token_weights=torch.rand(n, **like) + 0.1,
            beta=torch.tensor(0.04, device=device),
            temperature=temperature,
            old_logp=self.logp + normal(0.15),
            ref_logp=self.logp + normal(0.15),
        )
        self.rows = torch.randperm(n, **like)[:SAMPLE]
        self.columns = torch.cat([torch.randperm(v, **like)[:SAMPLE], self.targets[self.rows]])

    def slices(self) -> list[slice]:
        """The rows, SLICE at a time."""
        return [slice(start, start + SLICE) for start in range(0, len(self.hidden), SLICE)]

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """logp (N,), dhidden of `rows` and dweight of `columns` in fp64, of rounded logits."""
        weight = self.weight.double()
        logp, dhidden, dweight = [], [], 0.0
        for rows in self.slices():
            hidden = self.hidden[rows].double()
            logits = (hidden @ weight.T).to(self.weight.dtype).double().requires_grad_()
            fields = zip(Objective._fields[:7], self.objective.rows(rows)[:7], strict=True)
            given = {name: each.double() for name, each in fields if each is not None}
            result = grpo_loss_ref(logits, self.targets[rows], **given)
            (dlogits,) = torch.autograd.grad(result.loss, logits)
            logp.append(result.logp)
            dhidden.append(dlogits @ weight)
            dweight = dweight + dlogits[:, self.columns].T @ hidden
        return torch.cat(logp), torch.cat(dhidden)[self.rows], dweight


class Linear(Kernel):
    """The fused head with a trained weight."""

    name, modes, repeats = "linear", ("trained head",), 2
    tiny = Size(2, 96, 16)

    def variants(self) -> tuple[tuple, ...]:
        from mr1_fast.kernels.grpo.chunks import GEMM_VARIANTS

        return GEMM_VARIANTS

    def sizes(self) -> list[Size]:
        return [Size(8192, VOCABULARY, width) for width in (1536, 4096)]

    def checked_sizes(self) -> list[Size]:
        return [Size(4224, VOCABULARY, 1536)]

    def inputs(self, size: Size, dtype: torch.dtype, device: str, seed: int) -> HeadInputs:
        return HeadInputs(size, dtype, device, seed)

    def prepare(self, inputs: HeadInputs, mode: str) -> Launch:
        from mr1_fast.kernels.grpo.chunks import CHUNK_BYTES
        from mr1_fast.kernels.grpo.head import Head, NeedsGradient, head_rows
        from mr1_fast.kernels.grpo.linear import grpo_of_head

        hidden, weight, outputs = inputs.hidden, inputs.weight, []
        needs = NeedsGradient(hidden=True, weight=True, bias=False)

        def call(tile: tuple | None) -> None:
            bound = CHUNK_BYTES[hidden.device.type]
            rows = head_rows(hidden, weight, needs, bound, tile)
            head = Head(hidden, weight, None, needs, rows)
            outputs[:] = grpo_of_head(head, inputs.targets, inputs.objective)

        def errors() -> dict[str, Tensor]:
            _, logp, *_, dhidden, dweight, _ = outputs
            exact_logp, exact_dhidden, exact_dweight = inputs.exact
            of_logp, of_gradient = BOUNDS[weight.dtype]
            pairs = {
                "dhidden": (dhidden[inputs.rows], exact_dhidden),
                "dweight": (dweight[inputs.columns], exact_dweight),
            }
            return {"logp": largest(logp - exact_logp, of_logp)} | {
                name: largest((ours.double() - exact).norm() / exact.norm(), of_gradient)
                for name, (ours, exact) in pairs.items()
            }

        return Launch(call, outputs.clear, errors)
