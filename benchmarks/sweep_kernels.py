"""The kernels that sweep.py tries: for each its settings, its inputs, a launch, and what is right.

An error is in units of its bound, so that at most 1 is right, and NaN never is. Bounds are those of
the outputs' dtypes: fp32 statistics, gradients rounded once.
"""

from functools import cached_property

import torch
from sweep_checks import Guards, Launch, Size, largest, relative
from torch import Tensor

from mr1_fast.kernels.adamw.reference import adamw_ref, master_weight
from mr1_fast.kernels.adamw.rounding import decode_m, decode_v, random_keys
from mr1_fast.kernels.adamw.state import BLOCK, Scalars, State
from mr1_fast.kernels.grpo.objective import Objective, RowResults
from mr1_fast.kernels.grpo.reference import grpo_loss_ref, token_logprobs_ref

VOCABULARY, ODD_VOCABULARY = 151_936, 151_933
ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 9e-3}
"""Bound of the relative error of a gradient's elements; Triton's interpreter truncates bf16."""
STATISTICS = 2e-5
"""Bound of errors in fp32 statistics, relative to their largest value, or to 1."""
SAMPLE = 64
"""Rows that are compared with fp64; of all, the log-probabilities are with fp32."""
BALANCE = 5e-3
"""Bound of a row's summed gradient relative to that of its target, for all rows.

Exactly it is 0. Rounding leaves some 3e-5; a warp that wrote nothing, about 1e-2.
"""


class LossInputs:
    """Logits (N, V), the loss' other inputs, and its results in fp64 for some rows."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        n, v = size.rows, size.columns
        like = dict(device=device, generator=generator)
        odd = v % 16 != 0
        buffer = torch.empty(n, v + 5 * odd, dtype=dtype, device=device)
        self.logits = buffer.normal_(std=2.0, generator=generator)[:, :v]
        self.targets = torch.randint(v, (n,), **like)
        if odd:  # some tokens are banned
            self.logits[:, 7::97] = -torch.inf
            self.logits.scatter_(1, self.targets[:, None], 0.5)
        self.temperature = torch.tensor(0.9, device=device)
        parts = zip(self.logits.split(256), self.targets.split(256), strict=True)
        self.logp = torch.cat([token_logprobs_ref(x, t, self.temperature)[0] for x, t in parts])
        normal = lambda scale: scale * torch.randn(n, **like)  # noqa: E731
        self.objective = Objective(
            advantages=normal(1.0),
            token_weights=torch.rand(n, **like) + 0.1,
            beta=torch.tensor(0.04, device=device),
            temperature=self.temperature,
            old_logp=self.logp + normal(0.15),
            # Never near the policy's: a clipped row's gradient is β·(ref_logp − logp) alone, which
            # has as few digits as the difference.
            ref_logp=self.logp + 0.05 + 0.1 * torch.rand(n, **like),
        )
        self.picks = torch.randperm(n, **like)[:SAMPLE]

    @cached_property
    def exact(self) -> tuple[dict[str, Tensor], Tensor]:
        """Results and gradient of the rows `picks` in fp64."""
        rows = [x if x is None or x.ndim == 0 else x[self.picks] for x in self.objective[:7]]
        names = Objective._fields[:7]
        given = {k: x.double() for k, x in zip(names, rows, strict=True) if x is not None}
        logits = self.logits[self.picks].double().requires_grad_()
        result = grpo_loss_ref(logits, self.targets[self.picks], **given)
        (gradient,) = torch.autograd.grad(result.loss, logits)
        return result._asdict(), gradient


class Kernel:
    """A kernel of which nothing is missing, alone in its family."""

    name: str
    """In the table of launch settings, and on the command line."""
    tiny: Size
    """A size that Triton's interpreter gets through in a second."""
    rows_to_compile: int | None = 1
    """Rows with which it compiles as with any number; None: its own."""
    compiles_alone: bool = True
    """Whether its settings may be compiled in a thread beside others."""

    @property
    def family(self) -> str:
        """The name of several kernels, on the command line."""
        return self.name

    @property
    def benchmark(self) -> str:
        """The name of the document that it is in, perhaps with others."""
        return f"sweep_{self.name}"

    def missing(self, device: str) -> str | None:
        """Say what it lacks to run here; None: nothing."""
        return None


class Loss(Kernel):
    """The loss and its gradient on logits."""

    name, modes, repeats = "grpo", ("in place", "out of place"), 200
    tiny = Size(1, 4500)

    def row_grpo(self, *arguments, tile: tuple | None) -> None:
        """The launcher, with a setting."""
        from mr1_fast.kernels.grpo.rows_triton import row_grpo

        row_grpo(*arguments, tile)

    def variants(self) -> tuple[tuple, ...]:
        from mr1_fast.kernels.grpo.rows_triton import LOSS_VARIANTS

        return LOSS_VARIANTS

    def sizes(self) -> list[Size]:
        return [Size(8192, VOCABULARY), Size(2048, VOCABULARY)]

    def checked_sizes(self) -> list[Size]:
        return [Size(2048, VOCABULARY), Size(5, ODD_VOCABULARY)]

    def inputs(self, size: Size, dtype: torch.dtype, device: str, seed: int) -> LossInputs:
        return LossInputs(size, dtype, device, seed)

    def prepare(self, inputs: LossInputs, mode: str) -> Launch:
        guards, logits = Guards(), inputs.logits
        results = RowResults(*map(guards.like, RowResults.empty(logits)))
        out = guards.like(logits)
        source = out if mode == "in place" else logits

        def call(tile: tuple | None) -> None:
            given = source, inputs.targets, inputs.objective, results, out
            self.row_grpo(*given, tile=tile)

        def restore() -> None:
            out.copy_(logits) if source is out else out.fill_(torch.nan)
            for result in results:
                result.fill_(torch.nan if result.is_floating_point() else True)

        def errors() -> dict[str, Tensor]:
            exact, gradient = inputs.exact
            picks = inputs.picks
            found = {
                name: largest(
                    getattr(results, name)[picks] - exact[name],
                    STATISTICS * max(1.0, exact[name].abs().max().item()),
                )
                for name in ("logp", "entropy", "kl")
            }
            loss = exact["loss"]
            at_target = out.gather(1, inputs.targets[:, None])[:, 0].double().abs()
            unbalanced = out.sum(1, dtype=torch.float32).double() / (at_target + 1e-30)
            wrong = (results.clipped[picks] != exact["clipped"]).double().mean()
            error = relative(out[picks], gradient)
            return found | {
                "clipped": wrong / 0.05,  # a ratio may lie at the bound
                "logp of all rows": largest(results.logp - inputs.logp, 1e-4),
                "loss": largest(results.loss[picks].sum() - loss, 1e-4 * (1 + loss.abs().item())),
                "gradient": largest(error, ROUNDING[logits.dtype]),
                "gradient of all rows": largest(unbalanced, BALANCE),
                "NaN": torch.where(out.isnan().any() | results.loss.isnan().any(), torch.inf, 0.0),
                "canaries": guards.broken(),
            }

        return Launch(call, restore, errors)


class NativeLoss(Loss):
    """The loss by csrc/ on CUDA."""

    name, tiny = "grpo_cuda", Size(1, 4608)

    def missing(self, device: str) -> str | None:
        from mr1_fast.kernels.grpo import rows_cuda

        library, words = rows_cuda.status()
        if library is None or device == "cpu":
            return words
        logits = torch.empty(1, VOCABULARY, dtype=torch.bfloat16, device=device)
        _, blocks = rows_cuda.cluster_blocks(logits, rows_cuda.CLUSTER_VARIANTS[0])
        return None if blocks else words

    def variants(self) -> tuple[tuple, ...]:
        from mr1_fast.kernels.grpo.rows_cuda import CLUSTER_VARIANTS

        return CLUSTER_VARIANTS

    def row_grpo(self, *arguments, tile: tuple | None) -> None:
        from mr1_fast.kernels.grpo.rows_cuda import row_grpo

        row_grpo(*arguments, tile)

    def checked_sizes(self) -> list[Size]:
        return [Size(2048, VOCABULARY), Size(5, 152_064)]  # whole 16 bytes


class Logprobs(Loss):
    """Log-probabilities and entropy alone; with weights, of which half are 0, rows are skipped."""

    name, modes, repeats = "logprobs", ("all rows", "half of the rows"), 20
    tiny = Size(2, 1500)

    def variants(self) -> tuple[tuple, ...]:
        from mr1_fast.kernels.grpo.logprobs_triton import LOGPROBS_VARIANTS

        return LOGPROBS_VARIANTS

    def prepare(self, inputs: LossInputs, mode: str) -> Launch:
        from mr1_fast.kernels.grpo.rows_triton import row_logprobs

        logits, picks, outputs = inputs.logits, inputs.picks, {}
        weights = None
        counts = torch.ones_like(inputs.targets, dtype=torch.bool)
        if mode != "all rows":
            weights = inputs.objective.token_weights.clone()
            weights[::2] = 0
            counts = weights != 0

        def call(tile: tuple | None) -> None:
            given = logits, inputs.targets, inputs.temperature
            names = "logp", "entropy", "peak", "log_sum"
            found = row_logprobs(*given, token_weights=weights, tile=tile)
            outputs.update(zip(names, found, strict=True))

        def errors() -> dict[str, Tensor]:
            exact, _ = inputs.exact
            checked = counts[picks]
            return {
                name: largest(
                    torch.where(checked, outputs[name][picks] - exact[name], 0.0),
                    STATISTICS * max(1.0, exact[name].abs().max().item()),
                )
                for name in ("logp", "entropy")
            } | {
                "logp of all rows": largest((outputs["logp"] - inputs.logp)[counts], 1e-4),
                "peak": largest((outputs["peak"] - logits.amax(1).float())[counts], 1e-30),
            }

        return Launch(call, outputs.clear, errors)


class AdamWInputs:
    """A bf16 weight, its gradient and a state in the middle of a run, and the step in fp64.

    `dtype` plays no part: other weights have no remainder.
    """

    def __init__(self, size: Size, dtype: torch.dtype, device: str, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        n = size.rows * size.columns
        like = dict(device=device, generator=generator)
        self.weight = (0.02 * torch.randn(n, **like)).bfloat16()
        self.weight[self.weight == 0] = 0.02  # with a negative remainder, 0 is NaN
        self.gradient = (1e-3 * torch.randn(n, **like)).bfloat16()
        state = State.zeros(self.weight, remainder=True)
        blocks = len(state.m_scale)
        self.state = state._replace(
            m=torch.randint(-127, 128, (n,), dtype=torch.int8, **like),
            v=torch.randint(0, 256, (n,), dtype=torch.uint8, **like),
            m_scale=1e-3 * (torch.rand(blocks, **like) + 0.5),
            v_scale=1e-6 * (torch.rand(blocks, **like) + 0.5),
            remainder=torch.randint(-32768, 32768, (n,), dtype=torch.int16, **like),
        )
        self.scalars = Scalars.at(100, 1e-4, (0.9, 0.98), 1e-8, 0.01)
        self.keys = random_keys(seed)

    def exact(self, remainder: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, m and v after the step in fp64, in whole blocks (blocks, 256)."""
        state = self.state
        weight = master_weight(self.weight, state.remainder) if remainder else self.weight
        m, v, weight, gradient = (
            blocks_of(x.double()) for x in (state.m, state.v, weight, self.gradient)
        )
        m = decode_m(m, state.m_scale.double()[:, None])
        v = decode_v(v, state.v_scale.double()[:, None])
        return adamw_ref(weight, gradient, m, v, self.scalars)


def blocks_of(x: Tensor) -> Tensor:
    """The elements (n,) in blocks (⌈n/256⌉, 256), padded with 0."""
    return torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


class AdamW(Kernel):
    """A step of AdamW with 8-bit states."""

    name, modes, repeats = "adamw", ("exact", "stochastic"), 20
    tiny = Size(1, 700)

    def variants(self) -> tuple[tuple, ...]:
        from mr1_fast.kernels.adamw.step_triton import ADAMW_VARIANTS

        return ADAMW_VARIANTS

    def sizes(self) -> list[Size]:
        return [Size(2**14, 2**13)]

    def checked_sizes(self) -> list[Size]:
        return [Size(2**10, 2**10), Size(1, 10_007)]

    def inputs(self, size: Size, dtype: torch.dtype, device: str, seed: int) -> AdamWInputs:
        return AdamWInputs(size, dtype, device, seed)

    def prepare(self, inputs: AdamWInputs, mode: str) -> Launch:
        from mr1_fast.kernels.adamw import step_triton

        guards, remainder = Guards(), mode == "exact"
        given = inputs.state if remainder else inputs.state._replace(remainder=None)
        pairs = [(guards.like(x), x) for x in (inputs.weight, *given) if x is not None]
        weight, *rest = (ours for ours, _ in pairs)
        state = State(*rest)

        def call(tile: tuple | None) -> None:
            arguments = inputs.gradient, state, inputs.scalars, inputs.keys, None
            step_triton.adamw_(weight, *arguments, tile=tile)

        def restore() -> None:
            for ours, right in pairs:
                ours.copy_(right)

        def code_error(codes: Tensor, scale: Tensor, exact: Tensor, largest_code: int, root: float):
            """How far codes are from the exact one, of which rounding takes a neighbour."""
            share = (exact.abs() / scale.double()[:, None]).clamp(max=1) ** root
            return largest(blocks_of(codes.double()).abs() - largest_code * share, 1.001)

        def errors() -> dict[str, Tensor]:
            exact, m, v = inputs.exact(remainder)
            ours = master_weight(weight, state.remainder) if remainder else weight
            near = 2**-22 if remainder else 2**-7
            error = blocks_of(ours.double()) - exact
            bound = near * exact.abs() + 1e-4 * inputs.scalars.lr
            return {
                "weight": largest(error / bound, 1.0),
                "m": code_error(state.m, state.m_scale, m, 127, 1 / 4),
                "v": code_error(state.v, state.v_scale, v, 255, 1 / 8),
                "m_scale": largest(state.m_scale / m.abs().amax(1) - 1, 1e-5),
                "v_scale": largest(state.v_scale / v.amax(1) - 1, 1e-5),
                "canaries": guards.broken(),
            }

        return Launch(call, restore, errors)
