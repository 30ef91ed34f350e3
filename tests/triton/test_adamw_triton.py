"""The optimizer's kernels give the bits that PyTorch gives on a CPU."""

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl

from mr1_fast.kernels.adamw import state as adamw_state
from mr1_fast.kernels.adamw import step as adamw_step
from mr1_fast.kernels.adamw import step_triton
from mr1_fast.kernels.adamw.rounding import from_element, random_keys
from mr1_fast.kernels.adamw.state import Scalars, State

STEPS = 3


def inputs(
    n: int, weight_dtype: torch.dtype, gradient_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw weights (n,), and gradients (STEPS, n) that differ in size, with zeros among them."""
    generator = torch.Generator().manual_seed(n)
    gradients = torch.randn(STEPS, n, generator=generator)
    gradients = gradients * 10 ** (-6 * torch.rand(n, generator=generator))
    gradients[:, ::5] = 0
    weight = 0.02 * torch.randn(n, generator=generator)
    return weight.to(weight_dtype), gradients.to(gradient_dtype)


def steps(weight, gradients, remainder: bool, grad_scale, device: str) -> list[torch.Tensor]:
    """Return the weight and the state after STEPS steps.

    5 canaries follow each of them in memory, and come last in it.
    """
    weight = torch.cat([weight, torch.full((5,), 7.0, dtype=weight.dtype)]).to(device)
    n = len(weight) - 5
    whole = State.zeros(weight, remainder)
    blocks = -(-n // adamw_state.BLOCK)
    state = State(whole.m[:n], whole.v[:n], whole.m_scale[:blocks], whole.v_scale[:blocks],
                  None if whole.remainder is None else whole.remainder[:n])  # fmt: skip
    grad_scale = None if grad_scale is None else torch.tensor(grad_scale, device=device)
    for step, gradient in enumerate(gradients.to(device), start=1):
        scalars = Scalars.at(step, 1e-3 / step, (0.9, 0.98), 1e-8, 0.01)
        adamw_step.adamw_(weight[:n], gradient, state, scalars, random_keys(0, step), grad_scale)
    return [each.cpu() for each in (weight, *whole) if each is not None]


@pytest.mark.parametrize("n", [1, 255, 257, 1000, 40_000])
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("weight_dtype", "remainder"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)],
)
def test_steps_give_the_bits_of_pytorch(
    device, monkeypatch, n, gradient_dtype, weight_dtype, remainder
):
    weight, gradients = inputs(n, weight_dtype, gradient_dtype)
    grad_scale = None if n == 257 else 0.7
    ours = steps(weight, gradients, remainder, grad_scale, device)
    monkeypatch.setattr(adamw_step, "use_triton", lambda weight: False)
    assert all(map(torch.equal, ours, steps(weight, gradients, remainder, grad_scale, "cpu")))
    assert not torch.equal(ours[0][:n], weight) or n == 1


@pytest.mark.parametrize("tile", step_triton.ADAMW_VARIANTS, ids=str)
def test_every_tile_gives_the_same_bits(device, monkeypatch, tile):
    weight, gradients = inputs(1300, torch.bfloat16, torch.bfloat16)
    expected = steps(weight, gradients[:1], True, None, device)
    monkeypatch.setattr(step_triton, "_tile", lambda device: tile)
    assert all(map(torch.equal, expected, steps(weight, gradients[:1], True, None, device)))


@triton.jit
def bad_guess(x, LARGEST: tl.constexpr, SQUARINGS: tl.constexpr):
    """A guess that is off by 0.4 codes, now up and now down."""
    for _ in tl.static_range(SQUARINGS):
        x = tl.sqrt(x)
    guess = x * LARGEST
    off = tl.where(guess * 64 - tl.floor(guess * 64) < 0.5, 0.4, -0.4)
    return tl.floor(guess + off + 0.5)


def test_codes_do_not_depend_on_the_guess_of_the_root(device, monkeypatch):
    if device == "cuda":
        pytest.skip("a compiled kernel keeps the functions that it was compiled with")
    weight, gradients = inputs(16_384, torch.bfloat16, torch.bfloat16)
    expected = steps(weight, gradients[:2], True, None, device)
    calls = []
    guess = lambda *arguments: calls.append(1) or bad_guess(*arguments)  # noqa: E731
    monkeypatch.setattr(step_triton, "_guess", guess)
    others = steps(weight, gradients[:2], True, None, device)
    assert calls and all(map(torch.equal, expected, others))


def test_the_order_of_programs_does_not_matter(device, reverse_grid):
    weight, gradients = inputs(40_000, torch.bfloat16, torch.bfloat16)
    forwards = steps(weight, gradients, True, None, device)
    reverse_grid()
    assert all(map(torch.equal, forwards, steps(weight, gradients, True, None, device)))


@pytest.mark.parametrize("n", [1, 255, 257, 40_000])
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
def test_sums_give_the_bits_of_pytorch(device, monkeypatch, n, gradient_dtype):
    weight, gradients = inputs(n, torch.bfloat16, gradient_dtype)
    gradients[0, : n // 100] = torch.inf
    gradients[0, n // 100 : n // 50] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(
        torch.float32
    )
    ours, theirs = weight.to(device), weight.clone()
    adamw_step.add_stochastic_(ours, gradients[0].to(device), seed=3)
    monkeypatch.setattr(adamw_step, "use_triton", lambda weight: False)
    adamw_step.add_stochastic_(theirs, gradients[0], seed=3)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("key0", [5, 2**31 - 700, -(2**31), -600])
@pytest.mark.parametrize("remainder", [True, False])
def test_parts_give_the_bits_of_the_whole(device, key0, remainder):
    """Keys beside the ends of int32 count across them, as those of a part far behind do."""
    weight, (gradient, *_) = inputs(1300, torch.bfloat16, torch.bfloat16)
    weight, gradient = weight.to(device), gradient.to(device)
    scalars, keys = Scalars.at(1, 1e-3, (0.9, 0.98), 1e-8, 0.01), (key0, 77)

    def stepped(bounds: list[int]) -> list[torch.Tensor]:
        ours, state = weight.clone(), State.zeros(weight, remainder)
        for first, end in pairwise(bounds):
            part = state.chunk(first, end - first + -end % adamw_state.BLOCK)
            part_keys = from_element(first, keys)
            own = slice(first, end)
            adamw_step.adamw_(ours[own], gradient[own], part, scalars, part_keys)
        return [each for each in (ours, *state) if each is not None]

    whole = stepped([0, 1300])
    assert all(map(torch.equal, whole, stepped([0, 512, 768, 1300])))
    shifted = State.zeros(weight, remainder)
    adamw_step.adamw_(other := weight.clone(), gradient, shifted, scalars, from_element(256, keys))
    assert not torch.equal(whole[1], shifted.m) and other.isfinite().all()


def test_sums_of_parts_give_the_bits_of_the_whole(device):
    weight, gradients = inputs(1300, torch.bfloat16, torch.float32)
    gradient = gradients[0].to(device)
    whole, parts = (weight.to(device, copy=True) for _ in range(2))
    adamw_step.add_stochastic_(whole, gradient, seed=3)
    for first, end in ((0, 300), (300, 301), (301, 1300)):
        adamw_step.add_stochastic_(parts[first:end], gradient[first:end], seed=3, first=first)
    assert torch.equal(whole, parts)
    adamw_step.add_stochastic_(again := weight.to(device, copy=True), gradient, seed=3, first=1)
    assert not torch.equal(whole, again)


def test_nothing_to_do(device):
    weight = torch.zeros(0, dtype=torch.bfloat16, device=device)
    scalars = Scalars.at(1, 1e-3, (0.9, 0.98), 1e-8, 0.01)
    adamw_step.adamw_(weight, weight, State.zeros(weight, True), scalars, (1, 2))
    step_triton.add_stochastic_(weight, weight, (1, 2))
