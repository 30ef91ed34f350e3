"""Prompts that cells share: the same bits as encoded anew, and a cell's files are the same."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from mr1_fast.config import ModelConfig
from mr1_fast.experiment import prompts as prompts_module
from mr1_fast.experiment import scales
from mr1_fast.experiment.command import make_experiment
from mr1_fast.experiment.prompts import KeptPrompts
from mr1_fast.experiment.run_cell import run_cell
from mr1_fast.experiment.scales import SCALES
from mr1_fast.experiment.settings import ExperimentConfig
from mr1_fast.model.load import make_policy
from mr1_fast.tasks import PromptFormat
from mr1_fast.tasks.data import load_examples
from mr1_fast.types import Example

from ..data.models import tiny_policy


@pytest.fixture(scope="module")
def items():
    """Items of both drawn tasks, one without an image, and a photo."""
    drawn = [
        item
        for task in ("counting", "figures")
        for item in load_examples(task, "drawn", "test", 0, 1).all(3)
    ]
    noise = torch.randint(256, (620, 610, 3), dtype=torch.uint8).numpy()
    photo = replace(drawn[0], images=[Image.fromarray(noise)])
    return [*drawn, replace(drawn[0], images=[]), photo]


def same(one, other):
    """Whether two prompts are equal, bit for bit."""
    for name, value in vars(one).items():
        found = getattr(other, name)
        if not (torch.equal(value, found) if torch.is_tensor(value) else value == found):
            return False
    return True


def test_a_kept_prompt_is_the_one_that_was_encoded(items, monkeypatch):
    policy, kept = tiny_policy(), KeptPrompts()
    fresh = policy.encode.many(items)
    photo = fresh[-1].pixel_values
    assert photo.nbytes > prompts_module.MOST_PIXELS > fresh[0].pixel_values.nbytes
    for _ in range(2):
        found = kept.of(policy).encode.many(items)
        assert all(same(*pair) for pair in zip(fresh, found, strict=True))
        assert len(kept.prompts) == len(items) - 1 and 0 < kept.size < 100_000  # but for the photo
    with monkeypatch.context() as patch:  # what is kept is not encoded again
        patch.setattr(type(policy.encode), "__call__", None)
        assert kept.of(policy).encode.many(items[:-1])

    other = replace(
        policy,
        encode=make_policy(
            policy.model, policy.processor, ModelConfig(device="cpu"), PromptFormat(suffix="?")
        ).encode,
    )
    (first,) = kept.of(other).encode.many(items[:1])
    assert not torch.equal(first.input_ids, fresh[0].input_ids)
    monkeypatch.setattr(prompts_module, "MOST_KEPT", kept.size)
    count = len(kept.prompts)
    assert kept.of(policy).encode(Example(**vars(items[0]))) and len(kept.prompts) == count


def test_a_cell_after_others_has_the_files_that_it_has_alone(tiny_folder, monkeypatch, tmp_path):
    tiny = SCALES["tiny"]
    short = dict(steps=2, prompts_per_step=2, num_generations=2, max_new_tokens=6, device="cpu")
    scale = replace(
        tiny,
        model=str(tiny_folder),
        settings={**tiny.settings, **short},
        seeds=(0,),
        curve_every=1,
        curve_items=3,
    )
    monkeypatch.setitem(scales.SCALES, "short", scale)
    made = []
    for name in ("after", "alone"):
        output = tmp_path / name
        config = ExperimentConfig(preset="short_generations", output=str(output), test_items=5)
        experiment = make_experiment(config)
        first, *_, last = experiment.cells()
        for cell in (first, last) if name == "after" else (last,):
            run_cell(experiment, cell)
            assert not experiment.result(cell).error
        assert len(experiment.prompts.prompts) == 2 * (5 + 3)
        folder = last.folder(output)
        made.append({path.name: path.read_bytes() for path in folder.glob("*.json*")})
        made[-1]["model"] = (folder / "run/final/model.safetensors").read_bytes()
    after, alone = made
    assert "curve.jsonl" in alone and "geometry-sampled.json" in alone
    del after["cell.json"], alone["cell.json"]  # which have times
    assert after == alone
