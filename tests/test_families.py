"""Each family through the commands: trained, stopped and resumed, evaluated, planned, adapted."""

import contextlib
import io
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from mr1_fast.evaluate.command import evaluate_model
from mr1_fast.evaluate.settings import parse as parse_evaluate
from mr1_fast.model.families import FAMILIES, auto_class, banned_tokens
from mr1_fast.model.processor import load_processor
from mr1_fast.model.tiny import BUILT_IN_MODELS, family_processor
from mr1_fast.tasks.data import load_examples

from .data.models import family_model, plain_inputs
from .data.runs import assert_same_run, interrupt, metrics, run


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def task(family):
    return "counting" if FAMILIES[family].vision else "arithmetic"


@pytest.fixture(scope="module")
def start(family, tmp_path_factory):
    """Folder of a fresh tiny model."""
    folder, processor = tmp_path_factory.mktemp(family), family_processor(FAMILIES[family])
    torch.manual_seed(0)
    family_model(processor, family).save_pretrained(folder)
    processor.save_pretrained(folder, family)
    return folder


@pytest.fixture(scope="module")
def arguments(start, task, run_args):
    return partial(run_args, model=start, task=task, save_every=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished run and what it printed."""
    folder, said = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        run(arguments(folder))
    return folder, said.getvalue()


def read(folder):
    """A model as anyone reads it, with transformers alone."""
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)


def last_answers(folder):
    """What the policy answered at the end of a run."""
    shown = json.loads((folder / "evaluation.json").read_text())["examples"]
    return [each["after"]["text"] for each in shown]


def answers(model, task, path):
    """What `python -m mr1_fast.evaluate` has it answer to the same items."""
    words = ["--samples=4", "--max-new-tokens=6", "--device=cpu", f"--task={task}"]
    evaluate_model(parse_evaluate([f"--model={model}", f"--output={path}", *words]))
    return [each["outputs"][0] for each in json.loads(path.read_text())["results"]]


def test_every_weight_is_trained(finished, start):
    folder, _ = finished
    before, after = read(start).state_dict(), read(folder / "final").state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    for step in metrics(folder):
        assert step["skipped"] == 0 and step["grad_norm"] > 0 and step["kl_limited"] == 0
        assert step["rollout_gap_max"] < 1e-4  # the rollout computes what training computes


def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path):
    folder = interrupt(finished[0], tmp_path / "interrupted")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    run(["--resume", str(folder)])
    assert_same_run(folder, finished[0])


@torch.no_grad()
def test_the_final_model_answers_the_same_with_transformers_alone(finished, family, task, tmp_path):
    final = finished[0] / "final"
    expected = last_answers(finished[0])
    assert any(expected)
    assert answers(final, task, tmp_path / "evaluation.json") == expected

    model, processor = read(final), load_processor(final, family)
    for example, answer in zip(
        load_examples(task, "drawn", "test", 0).all(4), expected, strict=True
    ):
        inputs = plain_inputs(SimpleNamespace(processor=processor), example)
        if not FAMILIES[family].vision:
            del inputs["mm_token_type_ids"]
        banned = list(banned_tokens(model.config))
        ids = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, suppress_tokens=banned or None
        )
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(new, skip_special_tokens=True) == answer


def test_the_card_says_what_the_model_reads_and_its_code_runs(finished, family, capsys):
    final = finished[0] / "final"
    card = (final / "README.md").read_text(encoding="utf-8")
    sees = FAMILIES[family].vision is not None
    assert f"pipeline_tag: {'image-text-to-text' if sees else 'text-generation'}\n" in card
    assert ("picture.png" in card) == sees
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    if not sees:  # the other code needs torchvision, and a picture
        pytest.importorskip("accelerate")
        exec(code.replace("path/to/final", str(final)), {})
        assert capsys.readouterr().out.strip()


def test_the_run_is_planned(finished):
    _, said = finished
    total = next(line for line in said.splitlines() if line.startswith("total"))
    assert len(total.split()) >= 4 and all(float(number) > 0 for number in total.split()[1:])
    assert "no memory plan" not in said


def test_adapters_are_trained_saved_and_trained_on(arguments, start, task, tmp_path):
    folder, again = tmp_path / "run", tmp_path / "again"
    run(arguments(folder, lora=True, steps=2, save="both"))
    final = folder / "final"
    expected = last_answers(folder)
    assert answers(final, task, tmp_path / "merged.json") == expected
    merged, before = read(final).state_dict(), read(start).state_dict()
    moved = {name for name in before if not torch.equal(before[name], merged[name])}
    assert len(moved) == 3 * 7 and not any("visual" in name for name in moved)

    run(arguments(again, model=final / "adapter", lora=True, steps=1))
    shown = json.loads((again / "evaluation.json").read_text())["examples"]
    assert [each["before"]["text"] for each in shown] == expected


def table_of_the_documentation():
    """The cells that claim a test: (feature, family, letter); and the tests by letter."""
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    tests = dict(re.findall(r"^- (\w): `(tests/.+)`$", text, re.MULTILINE))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header = rows.index([family.title for family in FAMILIES.values()])
    return [
        (feature, family, letter)
        for feature, *cells in rows[header + 1 :]
        for family, cell in zip(FAMILIES, cells, strict=True)
        for letter in cell.replace("–", "").split()
    ], tests


def test_each_cell_of_the_documentation_has_its_test():
    cells, tests = table_of_the_documentation()
    assert len(cells) > 90
    used = {letter.strip("()") for _, _, letter in cells}
    assert used == tests.keys()
    found = cases(tests.values())
    for feature, family, letter in cells:
        ids = found[tests[letter.strip("()")]]
        assert ids, f"{letter}: no such test"
        if "(" not in letter:
            runs = any(family in families_of(case) for case in ids)
            assert runs, f"{feature}: {tests[letter]} does not run with {family}"


def families_of(case):
    """The families that a case of a test names; Qwen2-VL where it names none."""
    names = {name: model.family.model_type for name, model in BUILT_IN_MODELS.items()}
    for family in FAMILIES.values():
        names |= dict.fromkeys((family.model_type, family.title), family.model_type)
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    found = re.findall(rf"\b(?:{'|'.join(longest_first)})\b", case)
    return {names[name] for name in found} or {"qwen2_vl"}


def cases(tests):
    """Test → a text for each of its cases, of the id and of the values of its parameters."""
    found = {test: [] for test in tests}

    class Collected:
        def pytest_collection_modifyitems(self, items):
            for item in items:
                name = f"{item.path.relative_to(item.config.rootpath)}::{item.originalname}"
                values = getattr(item, "callspec", SimpleNamespace(params={})).params
                found[name].append(f"{item.name} {values}")

    words = ["--collect-only", "-qq", "-p", "no:xdist", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*words, *found], plugins=[Collected()])
    return found
