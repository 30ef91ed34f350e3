"""DDP and FSDP2: two processes with half a batch each have the gradients of one with all of it."""

import itertools
import math
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mr1_fast import linear_grpo_loss, token_logprobs

from ..data.head import batch, loss_of, text_model

WORLD = 2
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(model, head_group: bool = False, **settings):
    """FSDP2 as trainers set it up: a group for each layer; the LM head in the root's or its own."""
    for layer in model.model.layers:
        fully_shard(layer, **settings)
    if head_group:
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        fully_shard(
            [model.model.embed_tokens, model.lm_head] if tied else model.lm_head, **settings
        )
    return fully_shard(model, **settings)


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "FSDP2, head in the root group": shard,
    "FSDP2, root resharded after forward": lambda model: shard(model, reshard_after_forward=True),
    "FSDP2, head a group of its own": lambda model: shard(model, head_group=True),
    "FSDP2, bf16": lambda model: shard(model, mp_policy=BF16),
    "FSDP2, bf16, head a group of its own": lambda model: shard(
        model, head_group=True, mp_policy=BF16
    ),
}
ROWS = {"every process has rows": False, "one process has no rows": True}
FORMS, HEADS = ("one pass", "two passes"), ("untied", "tied")
CASES = [
    (wrapper, FORMS[form], HEADS[head], list(ROWS)[form ^ head])
    for wrapper, form, head in itertools.product(WRAPPERS, range(2), range(2))
]
"""For each wrapper, every form with every head, and either of them with all rows and without."""


def whole_batch(rows: str) -> tuple[dict[str, Tensor], int]:
    """The batch of all processes, and how many of its tokens have a loss."""
    data = batch()
    if ROWS[rows]:
        data["mask"][len(data["mask"]) // WORLD :] = False
    return data, int(data["mask"].sum())


def cut(data: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: value.chunk(WORLD)[rank] for name, value in data.items()}


def backward(
    model, data: dict[str, Tensor], form: str, num_tokens: float, dtypes: set | None = None
) -> Tensor:
    """Loss of the batch, its gradients added to the parameters; notes the dtypes that f meets."""
    head = loss_of(form, data, num_tokens)

    def noting(hidden, weight, bias):
        result = head(hidden, weight, bias)
        if dtypes is not None:
            dtypes.update(
                {f"hidden {hidden.dtype}", f"weight {weight.dtype}", f"logp {result.logp.dtype}"}
            )
            dtypes.add(f"advantages {data['advantages'].dtype}")
        return result

    loss = model(input_ids=data["ids"], head=noting).loss
    loss.backward()
    return loss.detach()


@cache
def one_process(form: str, tied: bool, rows: str, dtype: torch.dtype):
    """Loss and gradients of the whole batch.

    In bf16, they are the fp32 mean of the halves' gradients, as FSDP2 reduces them.
    """
    data, num_tokens = whole_batch(rows)
    parts, total = [data], []
    if dtype == torch.bfloat16:
        parts = [cut(data, rank) for rank in range(WORLD)]
    model = text_model(tied)
    gradients = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for part in parts:
        model.zero_grad()
        total.append(backward(model, part, form, num_tokens / len(parts)) / len(parts))
        for name, parameter in model.named_parameters():
            gradients[name] += parameter.grad.float() / len(parts)
    return sum(total), gradients


def compare(wrapper: str, form: str, head: str, rows: str, rank: int) -> dict:
    """Relative errors of the loss and of the worst gradient, and the dtypes that f met."""
    tied, dtypes = head == "tied", set()
    data, num_tokens = whole_batch(rows)
    dtype = torch.bfloat16 if "bf16" in wrapper else torch.float32
    loss, expected = one_process(form, tied, rows, dtype)

    model = text_model(tied)
    wrapped = WRAPPERS[wrapper](model)
    # The backend averages over processes: a process weights its tokens by WORLD / num_tokens.
    own = backward(wrapped, cut(data, rank), form, num_tokens / WORLD, dtypes)
    dist.all_reduce(own)
    errors = {"loss": abs(own / WORLD / loss - 1).item()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        errors[name] = ((gradient - expected[name]).abs().max() / expected[name].abs().max()).item()
    return {"errors": errors, "dtypes": dtypes}


def outside_the_forward() -> list[str]:
    """The errors of calls with FSDP2's own parameter, after the head's group has been resharded."""
    model, data = shard(text_model(), head_group=True), batch()
    targets, advantages = data["targets"].flatten(), data["advantages"].flatten()
    hidden = model(input_ids=data["ids"], head=lambda states, weight, bias: states.flatten(0, 1))
    weight, said = model.lm_head.weight, []
    for call in (
        lambda: linear_grpo_loss(
            hidden, weight, targets, advantages, torch.ones_like(advantages), beta=0.0
        ),
        lambda: token_logprobs(weight, torch.zeros(len(weight), dtype=torch.int64)),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=WORLD, rank=rank)
    results = {}
    for case in CASES:
        try:
            results[case] = compare(*case, rank)
        except Exception as error:
            error.add_note(f"in {', '.join(case)}, rank {rank}")
            raise
    results["outside"] = outside_the_forward()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process measured, by case; an exception in a process is raised here."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_gradients_are_those_of_one_process_with_the_whole_batch(results, case):
    for result in results:
        assert len(result[case]["errors"]) > 10
        for name, error in result[case]["errors"].items():
            assert math.isfinite(error) and error < 2e-5, (name, error)


def test_what_the_function_holds_stays_fp32_in_mixed_precision(results):
    for result in results:
        for case in CASES:
            rows = "bfloat16" if "bf16" in case[0] else "float32"
            kept = {"advantages torch.float32", "logp torch.float32"}
            assert result[case]["dtypes"] == kept | {f"hidden torch.{rows}", f"weight torch.{rows}"}


def test_a_sharded_weight_outside_the_forward_is_refused(results):
    for result in results:
        for name, said in zip(("weight", "logits"), result["outside"], strict=True):
            assert said.startswith(f"{name} is a DTensor") and "add_head" in said
