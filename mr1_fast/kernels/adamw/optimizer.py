"""x"""

from collections.abc import Iterable, Iterator

import torch

from ...errors import UserError
from .rounding import (
    random_keys,
)
from .state import Scalars, State
from .step import adamw_


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with 8-bit states, whose update is not lost in bf16 weights.

    `remainder`: 2 bytes per bf16 parameter complete it to an fp32 master, exactly; without, the weight is rounded
    stochastically. fp32 parameters need neither. States exist from the start, so running out of memory shows there.

    A weight that is set from outside keeps its remainder, less than half of bf16's step: load weights first. The caller
    skips steps whose gradients are not finite. Same seed, gradients and settings: same bits, after a resume too.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        remainder: bool = True,
        seed: int = 0,
    ):
        if not (0 <= betas[0] < 1 and 0 < betas[1] < 1 and eps > 0):
            raise ValueError(
                f"betas {betas} and eps {eps}: expected β₁ in [0, 1), β₂ in (0, 1), ε > 0"
            )
        self.remainder, self.seed = remainder, seed
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters, contiguous and in bf16 or fp32, and allocate their state."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.bfloat16, torch.float32) or not p.is_contiguous():
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype}: contiguous bf16 or fp32 expected"
                )
            state = State.zeros(p, self.remainder)._asdict()
            step = torch.zeros((), dtype=torch.int64)  # on the CPU: read without synchronising
            self.state[p] = {
                "step": step,
                **{name: value for name, value in state.items() if value is not None},
            }

    @torch.no_grad()
    def step(self, grad_scale: torch.Tensor | None = None) -> None:
        """Update the parameters that have a gradient, which counts `grad_scale` times (0-d fp32, on its device)."""
        for index, (group, p) in enumerate(self._parameters()):
            if p.grad is None:
                continue
            state = self.state[p]
            state["step"] += 1
            step = state["step"].item()
            scalars = Scalars.at(
                step, group["lr"], group["betas"], group["eps"], group["weight_decay"]
            )
            tensors = State(**{name: value for name, value in state.items() if name != "step"})
            adamw_(p, p.grad, tensors, scalars, random_keys(self.seed, index, step), grad_scale)

    def load_state_dict(self, state_dict: dict) -> None:
        """Copy a saved state into this one, in its own dtypes; UserError where it is of another optimizer or model."""
        mine, saved = self.state, state_dict["state"]
        super().load_state_dict(
            {**state_dict, "state": {}}
        )  # torch's would cast the scales to the weights' dtype
        self.state = mine
        parameters = [p for _, p in self._parameters()]
        if set(saved) != set(range(len(parameters))):
            raise UserError(
                f"the saved optimizer has {len(saved)} parameters and this one {len(parameters)}: "
                "resume with the --model and the --lora of that run."
            )
        for index, p in enumerate(parameters):
            for name in mine[p].keys() | saved[index].keys():
                ours, theirs = mine[p].get(name), saved[index].get(name)
                if not _alike(ours, theirs):
                    raise UserError(
                        f"the saved optimizer's {name} of parameter {index} does not fit this one's: resume with the "
                        "--model and the --optimizer of that run."
                    )
                ours.copy_(theirs)

    def _parameters(self) -> Iterator[tuple[dict, torch.Tensor]]:
        return ((group, p) for group in self.param_groups for p in group["params"])


def _alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype)
