"""The notebooks run from top to bottom, on a small model and for few steps, and hold no outputs."""

import json
import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs the extra test")
nbformat = pytest.importorskip("nbformat", reason="needs the extra test")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FLAGS = (
    "--device cpu --steps 2 --prompts-per-step 2 --num-generations 2 --max-new-tokens 6 "
    "--eval-samples 4"
)


def read(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_there_is_a_notebook_for_each_kind_of_card():
    assert [path.stem for path in NOTEBOOKS] == ["l4_a100", "t4_lora"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(path):
    for cell in read(path).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def is_parameters(cell) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def test_the_notebooks_differ_in_their_parameters_and_the_cards_memory_alone():
    """So it is enough to run one of them."""
    first, second = (
        [
            re.sub(r"--vram [\d.]+", "--vram GB", cell.source)
            for cell in read(path).cells
            if cell.cell_type == "code" and not is_parameters(cell)
        ]
        for path in NOTEBOOKS
    )
    assert first == second and any("--vram GB" in source for source in first)


@pytest.mark.slow
def test_a_notebook_runs(tiny_folder, tmp_path, monkeypatch):
    notebook = read(FOLDER / "t4_lora.ipynb")
    (at,) = (i for i, cell in enumerate(notebook.cells) if is_parameters(cell))
    values = {"FLAGS": f"--model {tiny_folder} --lora {FLAGS}", "RUN": str(tmp_path / "run")}
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(source))

    # As in the other tests, an installation elsewhere must not stand in for this one.
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    client.execute()

    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "recomputed: 0 of 3 text layers" in text  # the plan
    assert "Qwen2VLForConditionalGeneration" in text  # the result, loaded
    shown = [
        output.data["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    assert any("srcdoc=" in html for html in shown)
    others = json.loads((tmp_path / "run" / "others.json").read_text(encoding="utf-8"))
    assert len(others["results"]) == 8
