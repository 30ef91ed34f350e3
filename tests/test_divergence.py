"""A run that has diverged ends with a sentence, and writes no weight that is no number."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mr1_fast import train
from mr1_fast.checkpoint import saved_steps
from mr1_fast.command_line import parse_train_config
from mr1_fast.distributed import SINGLE
from mr1_fast.divergence import MOST_SKIPPED, Divergence, not_finite
from mr1_fast.errors import UserError
from mr1_fast.report.plots import PLOTS

from .data.runs import metrics, run

SETTINGS = dict(steps=16, save_every=2, eval_samples=0, prompts_per_step=1, num_generations=2)
LOST = {"loss": math.nan, "grad_norm": math.nan, "skipped": 1.0}
FINAL = "final/model.safetensors"
FOUND = {"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0}


@pytest.fixture(scope="module", autouse=True)
def quick_runs():
    """Reports have two plots, and no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mr1_fast.report.plots.PLOTS", PLOTS[:2])
        yield


def refused(argv: list[str], message: str, watch: Callable | None = None) -> None:
    """Train until the run ends with a sentence; nothing in its folder is NaN or infinite."""
    config = parse_train_config(argv)
    with pytest.raises(UserError, match=message) as raised:
        train.train(config, watch)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
    folder = Path(config.output)
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    assert not (folder / "final").exists() and not list(folder.rglob(".*.partial"))


def trained(policy) -> torch.nn.Parameter:
    """Return a weight that every step uses and changes."""
    return next(p for n, p in policy.model.named_parameters() if n.endswith("norm.weight"))


def spoil_gradients(first: int, count: int) -> Callable:
    """Return a `watch` that puts NaN into the gradients of `count` steps, from `first` on."""
    step = [0]

    def spoiled(gradient):
        is_hit = first <= step[0] < first + count
        return gradient * math.nan if is_hit else None

    def watch(policy, steps_done):
        if not policy.__dict__.setdefault("hooked_by_test", False):
            policy.hooked_by_test = True
            trained(policy).register_hook(spoiled)
        step[0] = steps_done

    return watch


# --- the parts ----------------------------------------------------------------------------------


def test_only_steps_that_could_have_changed_a_weight_count_and_only_in_a_row():
    watched = Divergence(total_steps=100)
    for _ in range(3):
        assert not any(watched.observe(LOST) for _ in range(MOST_SKIPPED - 1))
        assert not watched.observe(FOUND) and watched.skipped == 0
    without_signal = {"beta": 0.1, "skipped": 1.0}
    assert not any(watched.observe(without_signal) for _ in range(99)) and watched.skipped == 0
    ends = []
    for _ in range(MOST_SKIPPED):  # one between them says nothing
        ends += [watched.observe(LOST), watched.observe(without_signal)]
    assert ends == [False] * 18 + [True, False]


def test_a_checkpoint_keeps_the_count():
    watched, resumed = Divergence(total_steps=100), Divergence(total_steps=100)
    assert watched.state() == {}
    assert not any(watched.observe(LOST) for _ in range(MOST_SKIPPED - 1))
    resumed.load(watched.state())
    assert resumed.skipped == 9 and resumed.observe(LOST)
    for damaged in ({}, {"skipped": 1.0}, {"skipped": -1, "counted": 0}):
        with pytest.raises(ValueError, match="damaged"):
            resumed.load(damaged)


def test_float16_may_look_for_its_loss_scale():
    watched = Divergence(total_steps=100)
    scales = [2.0**power for power in range(16, 0, -1)]
    assert not any(watched.observe(LOST | {"loss_scale": scale}) for scale in scales)
    assert watched.skipped == len(scales), "until then no checkpoint may push out those before"
    ends = [watched.observe(LOST | {"loss_scale": 1.0}) for _ in range(MOST_SKIPPED)]
    assert ends == [False] * 9 + [True]


def test_a_run_in_float16_whose_steps_are_all_skipped_ends():
    watched = Divergence(total_steps=12)
    scales = [2.0**power for power in range(16, 4, -1)]
    ends = [watched.observe(LOST | {"loss_scale": scale}) for scale in scales]
    assert ends == [False] * 11 + [True]
    watched = Divergence(total_steps=2)  # a trial that is too short to find the scale
    assert not any(watched.observe(LOST | {"loss_scale": scale}) for scale in scales[:2])


VALUES = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_element_that_is_no_number_is_found(dtype):
    largest = torch.finfo(dtype).max
    tensors = {
        "a": torch.full((3, 5), largest, dtype=dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "integers": torch.ones(4, dtype=torch.uint8),
        "b": torch.full((70,), -largest, dtype=dtype),
    }
    assert not_finite({}.items(), SINGLE) == not_finite(tensors.items(), SINGLE) == ""
    for value in VALUES.values():
        for name, index in (("a", (2, 4)), ("b", (0,)), ("b", (69,))):
            before, tensors[name][index] = tensors[name][index].item(), value
            assert not_finite(tensors.items(), SINGLE) == name
            tensors[name][index] = before


# --- whole runs ---------------------------------------------------------------------------------


def test_a_learning_rate_that_is_too_high_ends_the_run_each_time(run_args, tmp_path):
    settings = SETTINGS | dict(algo="sft", steps=60, learning_rate=1e4, lr_schedule="constant")
    message = r"10 steps in a row, up to step \d+, .*rate of 10000 may .*another run with lower"
    refused(argv := run_args(tmp_path / "run", **settings), message)
    done = len(metrics(tmp_path / "run"))
    assert done < 20
    refused([*argv, "--resume=auto"], message)
    assert len(metrics(tmp_path / "run")) == done


def test_one_step_is_left_out_and_the_run_goes_on(run_args, tmp_path, monkeypatch):
    live = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix_str", lambda _, text, **options: live.append(text))
    watch = spoil_gradients(first=3, count=1)
    argv = run_args(tmp_path / "run", **SETTINGS | dict(steps=5))
    train.train(parse_train_config(argv), watch)
    assert [step["skipped"] for step in metrics(tmp_path / "run")] == [0, 0, 0, 1, 0]
    assert ["skipped" in each for each in live] == [False, False, False, True, False]
    # The one of step 4 was due while it was skipped, and is made up for.
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2, 5]


def test_many_steps_end_it_and_it_goes_on_from_before_as_if_they_had_not_been(run_args, tmp_path):
    settings = SETTINGS | dict(algo="sft", steps=14)
    argv = run_args(folder := tmp_path / "run", **settings)
    refused(
        argv,
        "up to step 13, .* checkpoint of step 4 in .* is kept",
        spoil_gradients(4, MOST_SKIPPED),
    )
    assert saved_steps(folder / "checkpoints") == [2, 4]

    run(["--resume", str(folder)])
    run(run_args(tmp_path / "whole", **settings))
    assert metrics(folder) == metrics(tmp_path / "whole")
    for name in (FINAL, "checkpoints/step-000014/weights.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def spoil_weights(value: float, after: int) -> Callable:
    """Return a `watch` that makes one weight `value` after a number of steps."""

    def watch(policy, steps_done):
        if steps_done == after:
            with torch.no_grad():
                trained(policy).view(-1)[1] = value

    return watch


SPOILT = {
    "seen by a save": (dict(algo="sft"), math.inf, 4, r"after 4 steps model\..*norm\.weight has"),
    "seen by a step": (dict(algo="sft", save_every=3), math.nan, 4, "after 5 steps model"),
    "seen by final/": (dict(algo="sft", save_every=0), math.nan, 16, "after 16 steps .* no check"),
    "seen by a rollout": (dict(save_every=3), math.nan, 4, "in step 4, the model's logits are NaN"),
    "seen by an evaluation": (
        dict(eval_samples=2, eval_every=4, keep_best=True),
        math.nan,
        4,
        "in the evaluation after 4 steps, the model's logits are NaN",
    ),
}


@pytest.mark.parametrize("settings, value, after, message", SPOILT.values(), ids=SPOILT)
def test_weights_that_are_no_numbers_are_never_written(
    settings, value, after, message, run_args, tmp_path
):
    argv = run_args(folder := tmp_path / "run", **SETTINGS | settings)
    refused(argv, message, spoil_weights(value, after))
    assert all(step <= after for step in saved_steps(folder / "checkpoints"))


def test_a_model_that_begins_with_nan_is_refused_by_name(run_args, tiny_folder, tmp_path):
    """Also where no prompt would ever meet it: in the embedding of a token."""
    (tmp_path / "model").mkdir()
    for path in tiny_folder.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    weights = load_file(path := tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][-1, -1] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    argv = run_args(tmp_path / "run", model=tmp_path / "model")
    with pytest.raises(UserError, match=r"model .*/model has weights in .*embed_tokens\.weight"):
        run(argv)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_with_nan_of_an_earlier_version_is_not_trained_on(run_args, tmp_path):
    argv = run_args(folder := tmp_path / "run", **SETTINGS | dict(steps=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mr1_fast.run.not_finite", lambda *_: "")
        train.train(parse_train_config(argv), spoil_weights(math.nan, after=4))
    assert saved_steps(folder / "checkpoints") == [2, 4]
    with pytest.raises(UserError, match=r"checkpoint of step 4 in .* that are NaN .*: delete it"):
        run(["--resume", str(folder)])
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    run(["--resume", str(folder)])
    assert all(tensor.isfinite().all() for tensor in load_file(folder / FINAL).values())
