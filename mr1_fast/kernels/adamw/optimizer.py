"""The torch optimizer around the steps of step.py: parameter groups, seeds and checkpoints."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from ...errors import UserError
from .rounding import from_element, random_keys
from .state import Scalars, State
from .step import adamw_


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with 8-bit states, whose updates are not lost in bf16 weights.

    With `remainder`, 2 bytes per bf16 parameter complete it to an fp32 master, exactly; without,
    the weight is rounded stochastically. fp32 parameters need neither. States are allocated at the
    start, so that running out of memory shows there.

    The same seed, gradients and settings give the same bits, also after a resume. Load weights
    before making the optimizer: a weight that is set later keeps its old remainder, which is less
    than half of bf16's step. Skip a step whose gradients are not finite: the optimizer does not
    check them.

    Parameters may be parts of larger ones: `places` then has for each the larger one's number among
    all, and which of its elements is the part's first, a multiple of 256. The bits are those of the
    larger parameters' step.

    Raises ValueError for betas or eps outside their ranges, and for a parameter that is not
    contiguous or neither bf16 nor fp32.
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
        places: Sequence[tuple[int, int]] | None = None,
    ):
        if not (0 <= betas[0] < 1 and 0 < betas[1] < 1 and eps > 0):
            raise ValueError(
                f"betas are {betas} and eps is {eps}, but β₁ must lie in [0, 1), β₂ in (0, 1), and "
                "ε must be greater than 0"
            )
        self.remainder, self.seed, self.places = remainder, seed, places
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of contiguous bf16 or fp32 parameters, and allocate their states."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.bfloat16, torch.float32) or not p.is_contiguous():
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} and strides {p.stride()} is {p.dtype}, "
                    "but must be contiguous and bf16 or fp32"
                )
            # The count of steps lies on the CPU: reading it does not wait for a GPU.
            self.state[p] = {"step": torch.zeros((), dtype=torch.int64)}
            for name, value in State.zeros(p, self.remainder)._asdict().items():
                if value is not None:
                    self.state[p][name] = value

    @torch.no_grad()
    def step(self, grad_scale: torch.Tensor | None = None) -> None:
        """Update every parameter that has a gradient.

        grad_scale: what gradients are multiplied with, a 0-d fp32 tensor on their device (None: 1).
        """
        for index, (group, p) in enumerate(self._parameters()):
            if p.grad is None:
                continue
            tensors = dict(self.state[p])
            count = tensors.pop("step")
            count += 1
            step = count.item()

            scalars = Scalars.at(
                step, group["lr"], group["betas"], group["eps"], group["weight_decay"]
            )
            number, first = self.places[index] if self.places else (index, 0)
            keys = from_element(first, random_keys(self.seed, number, step))
            adamw_(p, p.grad, State(**tensors), scalars, keys, grad_scale)

    def load_state_dict(self, state_dict: dict) -> None:
        """Copy a saved state into this optimizer's tensors, which keep their dtypes.

        Raises UserError where the saved state is that of another optimizer or model.
        """
        mine, saved = self.state, state_dict["state"]
        # torch loads the groups alone: it would cast the states' scales to the weights' dtype.
        super().load_state_dict({**state_dict, "state": {}})
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
                        f"the saved optimizer's {name} of parameter {index} does not fit this "
                        "one's: resume with the --model and the --optimizer of that run."
                    )
                ours.copy_(theirs)

    def _parameters(self) -> Iterator[tuple[dict, torch.Tensor]]:
        """Go through the parameters in order, each with its group."""
        return ((group, p) for group in self.param_groups for p in group["params"])


def _alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Tell whether both tensors exist, with one shape and dtype."""
    return a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype)
