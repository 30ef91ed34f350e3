"""Gradients are summed, and parts of parameters updated, to the bit of what one process does."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from mr1_fast.config import OptimizerConfig
from mr1_fast.distributed import SINGLE, World
from mr1_fast.distributed.optimizer_shards import OptimizerShards
from mr1_fast.distributed.sharding import Sharding, buckets, round_into_, sum_seed
from mr1_fast.errors import UserError
from mr1_fast.kernels.adamw.optimizer import LowMemoryAdamW
from mr1_fast.kernels.adamw.rounding import from_element, random_bits, random_keys
from mr1_fast.kernels.adamw.state import BLOCK
from mr1_fast.model.joined_weights import as_one
from mr1_fast.optim import make_optimizer, update
from tests.data.gang import gang
from tests.data.models import tiny_policy
from tests.test_optim import batches_of, likelihood

KINDS = {"none": Sharding, "optimizer": OptimizerShards}
SHAPES = [(5,), (300,), (1536,), (1,), (7, 100), (64, 48), (3, 256), (4100,)]


class Odd(nn.Module):
    """A model of parameters of odd sizes, of which the two largest matrices lie in one memory."""

    def __init__(self, dtypes: list[torch.dtype]):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for number, shape in enumerate(SHAPES):
            values = 0.02 * torch.randn(shape, generator=generator)
            dtype = dtypes[number % len(dtypes)]
            self.register_parameter(f"p{number}", nn.Parameter(values.to(dtype)))
        first, second = self.p4, self.p6
        joined = torch.cat([first.detach().view(-1), second.detach().to(first.dtype).view(-1)])
        first.data = joined[:700].view(7, 100)
        second.data = joined[700:].view(3, 256)


def gradients_of(shape: tuple, seed: int, dtype: torch.dtype) -> Tensor:
    """Gradients that differ in size, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-4 * torch.rand(shape, generator=generator))
    gradient = torch.randn(shape, generator=generator) * sizes
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, gradient).to(dtype)


# --- exact AdamW on parts -------------------------------------------------------------------------


def stepped(dtype: torch.dtype, optimizer: str, size: int) -> dict[str, Tensor]:
    """Weights and states after 4 steps of `size` processes, each of which is played in turn."""
    whole: dict[str, list[Tensor]] = {}
    model = Odd([dtype])
    for rank in range(size):
        shards = OptimizerShards(model, World(rank=rank, size=size))
        config = OptimizerConfig(learning_rate=1e-2, optimizer=optimizer)
        # With or without its empty parts: the bits go by the number of the whole parameter.
        kept = [part for part in shards.parts if len(part.weight) or size != 4]
        stepper = make_optimizer(model, config, 3, kept)
        for step in range(4):
            for number, part in enumerate(shards.parts):
                gradient = gradients_of(part.whole, 10 * number + step, dtype).view(-1)
                own = gradient[part.first : part.first + len(part.weight)]
                part.weight.grad = own if len(own) else None
            if number := step % 3:  # some have none at times
                shards.parts[number].weight.grad = None
            if isinstance(stepper, LowMemoryAdamW):
                stepper.step(grad_scale=torch.tensor(0.7))
            else:
                stepper.step()
        for part in kept:
            for name, value in stepper.state[part.weight].items():
                if name != "step" or len(part.weight):
                    whole.setdefault(f"{part.name} {name}", []).append(value.view(-1))
    # The step is counted by each process that has some of a parameter.
    found = {
        name: values[0] if name.endswith(" step") else torch.cat(values)
        for name, values in whole.items()
    }
    for name, values in whole.items():
        assert not name.endswith(" step") or len({value.item() for value in values}) == 1
    return found | {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        (torch.bfloat16, "adamw_exact"),
        (torch.bfloat16, "adamw_stochastic"),
        (torch.float32, "adamw_exact"),
        (torch.float32, "adamw"),
    ],
)
def test_any_number_of_processes_has_the_same_bits(dtype, optimizer):
    alone = stepped(dtype, optimizer, 1)
    assert not torch.equal(alone["p5"], Odd([dtype]).p5)
    for size in (2, 3, 4, 8):
        together = stepped(dtype, optimizer, size)
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.equal(together[name], value), (size, name)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_are_whole_blocks_that_cover_each_parameter_once(size):
    model = Odd([torch.bfloat16])
    parts = [OptimizerShards(model, World(rank, size)).parts for rank in range(size)]
    for number, (name, p) in enumerate(model.named_parameters()):
        end = 0
        for part in (each[number] for each in parts):
            assert (part.name, part.whole, part.first) == (name, p.shape, end)
            assert part.first % BLOCK == 0 or not len(part.weight)
            end += len(part.weight)
            if len(part.weight):
                element = p.data_ptr() + part.first * p.element_size()
                assert part.weight.data_ptr() == element, "the model's own memory"
        assert end == p.numel()
        most = max(len(each[number].weight) for each in parts)
        assert most <= math.ceil(math.ceil(p.numel() / BLOCK) / size) * BLOCK
    assert as_one([model.p4.view(-1, 1), model.p6.view(-1, 1)]) is not None


def test_parts_beyond_2_to_31_elements_have_the_random_bits_of_the_whole():
    keys = random_keys(1, 2, 3)
    for first in (2**31 - 256, 2**31 + 512, 2**32 - 256, 2**32 + 256):
        device = torch.device("cpu")
        expected = random_bits(first, 600, keys, device)
        assert torch.equal(random_bits(0, 600, from_element(first, keys), device), expected)
        inside = random_bits(256, 344, from_element(first, keys), device)
        assert torch.equal(inside, expected[256:])


# --- sums and exchange ----------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_buckets_have_everything_once_and_in_order(most):
    lengths = [5, 0, 3, 3, 9, 1]
    found = list(buckets(lengths, most))
    sizes = [sum(piece.stop - piece.start for _, piece in bucket) for bucket in found]
    assert max(sizes) <= most
    ends = dict.fromkeys(range(len(lengths)), 0)
    for number, piece in (entry for bucket in found for entry in bucket):
        assert piece.start == ends[number] and all(
            ends[earlier] == lengths[earlier] for earlier in range(number)
        )
        ends[number] = piece.stop
    assert list(ends.values()) == lengths


DTYPES = [torch.bfloat16, torch.float32, torch.bfloat16]
WITHOUT = {0: (6,), 1: (1, 6), 2: (1, 5, 6)}
"""Parameters that have no gradient on a process; number 6 has none on any."""


def whole_numbers(number: int, rank: int, dtype: torch.dtype) -> Tensor:
    """A gradient of whole numbers, whose fp32 sums are exact in any order."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    most = 200 if dtype == torch.bfloat16 else 2**16  # what bf16 holds, unlike their sum
    return torch.randint(-most, most, SHAPES[number], generator=generator).to(dtype)


def sum_and_share(world, kind: str):
    """Sums, norms, and weights whose parts each process has set to its own number."""
    answers = []
    for bucket in (10**6, 1000):
        model = Odd(DTYPES)
        sharding = KINDS[kind](model, world)
        sharding.bucket = bucket
        for number, p in enumerate(sharding.parameters):
            if number not in WITHOUT[world.rank]:
                p.grad = whole_numbers(number, world.rank, p.dtype)
        sharding.sum_gradients(seed=7)
        grads = [part.weight.grad for part in sharding.parts]
        sums = [None if grad is None else grad.clone() for grad in grads]
        norm = sharding.gradient_norm()

        if kind == "optimizer":
            for part in sharding.parts:
                part.weight.data.fill_(world.rank + 1)
            sharding.share_weights()
        weights = [p.detach().clone() for p in sharding.parameters]

        if world.rank == 0:
            grads[5][..., 0] = float("nan")
        bounds = [(part.first, part.weight.numel()) for part in sharding.parts]
        answers.append((sums, norm, weights, sharding.gradient_norm().item(), bounds))
    return answers


def sum_and_share_all(world):
    return {kind: sum_and_share(world, kind) for kind in KINDS}


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_exact_and_rounded_alike_in_any_bucket(size):
    expected = []
    for number, p in enumerate(Odd(DTYPES).parameters()):
        total = torch.zeros(p.shape)
        for rank in range(size):
            if number not in WITHOUT[rank]:
                total += whole_numbers(number, rank, p.dtype).float()
        rounded = torch.empty_like(total, dtype=p.dtype)
        round_into_(rounded.view(-1), total.view(-1), sum_seed(7, number))
        expected.append(rounded.view(-1))
    norm = torch.cat([each.double() for each in expected]).norm().item()
    assert (expected[2] % 2 == 0).any() and expected[2].abs().max() > 256, "some are rounded"

    answers = gang(size, sum_and_share_all)
    for kind, bucket in product(KINDS, (0, 1)):
        of_bucket = [answer[kind][bucket] for answer in answers]
        for number, whole in enumerate(expected):
            for sums, *_, bounds in of_bucket:
                first, count = bounds[number]
                if number == 6 or not count:
                    assert sums[number] is None
                else:
                    assert torch.equal(sums[number].view(-1), whole[first : first + count])
        norms = {answer[1].item() for answer in of_bucket}
        assert len(norms) == 1 and norms.pop() == pytest.approx(norm, rel=1e-6)
        assert all(answer[3] != answer[3] for answer in of_bucket), "all know of the NaN of one"
        if kind == "optimizer":
            assert_shared([answer[2] for answer in of_bucket], [a[4] for a in of_bucket])


def assert_shared(weights: list[list[Tensor]], bounds: list[list[tuple[int, int]]]) -> None:
    for number, start in enumerate(Odd(DTYPES).parameters()):
        whole = start.detach().clone().view(-1)
        for rank, of_rank in enumerate(bounds):
            first, count = of_rank[number]
            whole[first : first + count] = rank + 1
        for rank, of_rank in enumerate(weights):
            if number == 6:  # without a gradient it was not updated, and is not sent
                first, count = bounds[rank][number]
                assert (of_rank[number].view(-1)[first : first + count] == rank + 1).all()
            else:
                assert torch.equal(of_rank[number].view(-1), whole), (number, rank)


# --- a whole update -------------------------------------------------------------------------------


def updated(world, kind: str, dtype: torch.dtype, infinite: bool = False):
    """Three updates on packs that only the first two processes have, the first more of them."""
    policy = tiny_policy(dtype)
    sharding = KINDS[kind](policy.model, world)
    config = OptimizerConfig(learning_rate=1e-3, lr_schedule="constant", max_grad_norm=0.5)
    optimizer = make_optimizer(policy.model, config, 0, sharding.parts)
    packs = batches_of(policy, 100)
    shares = {1: [packs], 2: [packs[:-1], packs[-1:]], 3: [packs[:-1], packs[-1:], []]}

    def loss(policy, batch):
        loss, per_row = likelihood(policy, batch)
        return loss * (torch.inf if infinite and world.rank else 1), per_row

    mine = shares[world.size][world.rank]
    found = [
        update(policy, optimizer, mine, loss, step, 3, config, sharding=sharding)
        for step in range(3)
    ]
    assert all(p.grad is None for p in [*sharding.parameters, *(x.weight for x in sharding.parts)])
    return found, dict(policy.model.state_dict())


def update_all(world):
    return {
        kind: (
            updated(world, kind, torch.float32),
            updated(world, kind, torch.bfloat16),
            updated(world, kind, torch.float32, infinite=True),
            no_memory_to_step(world, kind),
        )
        for kind in KINDS
    }


def no_memory_to_step(world, kind: str) -> str:
    """What all say where the exchange of weights runs out of memory."""
    policy, config = tiny_policy(), OptimizerConfig()
    sharding = KINDS[kind](policy.model, world)
    optimizer = make_optimizer(policy.model, config, 0, sharding.parts)

    def fail():
        raise torch.OutOfMemoryError("no room")

    sharding.share_weights = fail
    with pytest.raises(UserError) as error:
        update(policy, optimizer, [], likelihood, 0, 1, config, sharding=sharding)
    return str(error.value)


LOSS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Relative bounds of the loss; those of norms, which are sums of more roundings, are ten times."""


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_updates_with_unequal_packs_are_those_of_one_process(size):
    start = dict(tiny_policy().model.state_dict())
    alone = [updated(SINGLE, "none", dtype) for dtype in LOSS]
    answers = gang(size, update_all)
    for kind, (number, (dtype, bound)) in product(KINDS, enumerate(LOSS.items())):
        first_metrics, first_weights = answers[0][kind][number]
        for metrics, weights in (answer[kind][number] for answer in answers):
            assert metrics == first_metrics, "all report the same"
            assert all(torch.equal(weights[name], w) for name, w in first_weights.items())
        for step, (ours, expected) in enumerate(zip(first_metrics, alone[number][0], strict=True)):
            assert ours["loss"] == pytest.approx(expected["loss"], rel=bound), (kind, dtype, step)
            assert ours == pytest.approx(expected, rel=10 * bound), (kind, dtype, step)
        if dtype == torch.float32:
            for name, value in alone[number][1].items():
                torch.testing.assert_close(first_weights[name], value, rtol=1e-4, atol=2e-5)

    for kind, answer in product(KINDS, answers):
        *_, (metrics, weights), refusal = answer[kind]
        assert [each["skipped"] for each in metrics] == [1.0] * 3
        assert all(torch.equal(start[name], value) for name, value in weights.items())
        assert "within the optimizer's step" in refusal
