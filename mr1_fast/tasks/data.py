"""Where examples come from: drawn by a task, or loaded from data in R1-V's columns.

One class per source, with the same methods. What `take` returns depends on the arguments alone, so a run that resumes
at step n passes n and needs no saved state.
"""

import io
import json
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image, ImageOps

from ..config import TrainConfig
from ..errors import UserError
from ..hub import hub_splits, load_splits
from ..types import Example
from . import get_task
from .split import SPLITS

TEST_SETS = {
    "superclevr200": "superclevr_test200_counting_problems.jsonl",
    "geoqa": "geoqa_test_prompts.jsonl",
}
"""The paper's two test sets, by name: R1-V's file that lists them."""
LISTS = "https://github.com/StarsfieldAI/R1-V, src/eval/prompts"
"""Where those files are. They are small, but not ours to hand on."""
ARCHIVES = {
    "superclevr_test200_counting_problems.jsonl": "images",
    "geoqa_test_prompts.jsonl": "Geo170K",
}
"""The first folder of each list's image paths: what SuperCLEVR's images.zip unpacks to, and the one in which R1-V
unpacks Geo170K's. image_root may hold that folder, or be it under any name."""
COLUMNS = {
    "images": ("image", "images", "image_path"),
    "problem": ("problem", "question"),
    "solution": ("solution", "ground_truth"),
}
"""Field of an example: the columns that may hold it, R1-V's training data first, then its test sets."""
FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".csv": "csv"}
"""Suffix: the name that `datasets` has for the format. Lines of JSON (`.jsonl`) are read here."""


class DrawnExamples:
    """Examples drawn by a task module: endlessly many, or the first `limit` over and over (then `len()` works)."""

    def __init__(
        self, task: ModuleType, split: str, seed: int, difficulty: int = 1, limit: int | None = None
    ) -> None:
        _check_split(split)
        _check_limit(limit)
        if difficulty < 1:
            raise UserError(
                f"difficulty is {difficulty}, but the easiest is 1: set it to 1 or more."
            )
        self.task, self.split, self.seed, self.difficulty, self.limit = (
            task,
            split,
            seed,
            difficulty,
            limit,
        )

    def __len__(self) -> int:
        if self.limit is None:
            raise TypeError("drawn examples without a limit have no length")
        return self.limit

    def take(self, step: int, count: int) -> list[Example]:
        """The `count` examples of training step `step` (from 0); with a limit, reshuffled every epoch."""
        if self.limit is None:
            return [self._draw(index) for index in range(step * count, (step + 1) * count)]
        return [
            self._draw(index) for index in _shuffled(self.limit, self.seed, step * count, count)
        ]

    def all(self, count: int) -> list[Example]:
        """The first `count` examples (no more than the limit), for evaluation."""
        return [
            self._draw(index)
            for index in range(count if self.limit is None else min(count, self.limit))
        ]

    def require_thinking(self) -> None:
        """Nothing to check: drawn examples always have a worked solution."""

    def _draw(self, index: int) -> Example:
        return self.task.draw(self.split, self.seed, index, self.difficulty)


class LoadedExamples:
    """Examples from rows with the columns `image` or `images`, `problem`, `solution` and perhaps `thinking`.

    `rows` is a list of dictionaries or a `datasets.Dataset`. A row is read, and its images are decoded, only when it
    is taken. Raises UserError for missing columns at once, and for a bad row or image when it is taken.
    """

    def __init__(
        self,
        rows: Sequence,
        source: str,
        seed: int,
        limit: int | None = None,
        image_root: str | Path = ".",
        archive: str | None = None,
    ) -> None:
        """`source` names the data in messages; relative image paths start at the folder `image_root`.

        A first folder `archive` of a path is `image_root` itself, unless `image_root` has a folder of that name.
        """
        _check_limit(limit)
        if not len(rows):
            raise UserError(f"{source} is empty: give data with at least one row.")
        self.rows, self.source, self.seed = rows, source, seed
        if not isinstance(rows, list):
            self.rows = rows.with_format(
                "arrow"
            )  # leaves images encoded, so that a broken one is reported by its row
        self.image_root, self.archive = Path(image_root).expanduser(), archive
        self.columns = _find_columns(_column_names(rows), source)
        self.size = len(rows) if limit is None else min(limit, len(rows))

    def __len__(self) -> int:
        return self.size

    def take(self, step: int, count: int) -> list[Example]:
        """The `count` examples of training step `step` (from 0), reshuffled every epoch."""
        return [self._read(index) for index in _shuffled(self.size, self.seed, step * count, count)]

    def all(self, count: int) -> list[Example]:
        """The first `count` examples (no more than there are), in the order of the data, for evaluation."""
        return [self._read(index) for index in range(min(count, self.size))]

    def require_thinking(self) -> None:
        """Raise UserError unless every row has the worked solution that supervised training imitates."""
        names = _column_names(self.rows)
        if "thinking" not in names:
            raise UserError(
                f"{self.source} has no column 'thinking' (found: {', '.join(names)}): add it, for supervised training "
                "imitates it, or imitate the answers alone with --sft-target answer."
            )
        if isinstance(self.rows, list):
            texts = [row.get("thinking") for row in self.rows]
        else:
            texts = self.rows.select_columns("thinking")[:]["thinking"].to_pylist()
        for index, text in enumerate(texts[: self.size]):
            if not str(text or "").strip():
                raise UserError(
                    f"row {index + 1} of {self.source} has no 'thinking': fill it in or leave the row out."
                )

    def _read(self, index: int) -> Example:
        row = self.rows[index] if isinstance(self.rows, list) else self.rows[index].to_pylist()[0]
        name = f"row {index + 1} of {self.source}"
        cells = row.get(self.columns["images"])
        cells = cells if isinstance(cells, (list, tuple)) else [] if cells is None else [cells]
        paths = [cell.get("path") if isinstance(cell, dict) else cell for cell in cells]
        return Example(
            # Some data marks the image's place in the text; here images always come first.
            problem=self._text(row, "problem", name).replace("<image>", "").strip(),
            images=tuple(_decode(cell, self.image_root, self.archive, name) for cell in cells),
            solution=_inside("answer", self._text(row, "solution", name)),
            thinking=_inside("think", str(row.get("thinking") or "")),
            key=" ".join(path for path in paths if isinstance(path, str)) or f"row {index + 1}",
        )

    def _text(self, row: dict, field: str, name: str) -> str:
        value = row.get(self.columns[field])
        if (
            isinstance(value, float) and value.is_integer()
        ):  # a column of whole numbers with a gap in it
            value = int(value)
        if value is None or not str(value).strip():
            raise UserError(
                f"{name} has no {self.columns[field]!r}: fill it in or leave the row out."
            )
        return str(value).strip()


def load_examples(
    task: str,
    data: str,
    split: str,
    seed: int,
    difficulty: int = 1,
    limit: int | None = None,
    image_root: str | None = None,
) -> DrawnExamples | LoadedExamples:
    """The examples of one split ("train", "validation" or "test").

    `data` is `drawn`, or a test set of the paper (`superclevr200`, `geoqa`: `image_root` is then the folder with R1-V's
    list and the images, see ARCHIVES), or a .jsonl, .json, .csv, .parquet or .arrow file, a folder, or a name on the
    Hugging Face Hub. `difficulty` is for drawn data only. A single file belongs to the split that its name mentions, or
    else to train (to test, if it has the columns of R1-V's test sets). Raises UserError with the way out.
    """
    module = get_task(task)
    _check_split(split)
    if data == "drawn":
        return DrawnExamples(module, split, seed, difficulty, limit)
    if data in TEST_SETS:
        data = _find_list(data, image_root)
    path = Path(data).expanduser()
    if path.is_file():
        rows = _file_rows(path, split)
    elif path.is_dir():
        rows = _folder_rows(path, split)
    elif (
        path.suffix in (".jsonl", *FILE_FORMATS)
        or data.startswith((".", "/", "~"))
        or data.count("/") > 1
    ):
        raise UserError(f"{data} is missing: check the path of the data.")
    else:
        rows = _pick(hub_splits(data), split, data)
    folder = path.parent if path.is_file() else path
    return LoadedExamples(rows, data, seed, limit, image_root or folder, ARCHIVES.get(path.name))


def _find_list(name: str, image_root: str | None) -> str:
    """Path of a test set's list: in `image_root`, or in the folder prompts there, as in a clone of R1-V."""
    listed = TEST_SETS[name]
    if image_root is None:
        raise UserError(
            f"data {name} needs image_root: the folder with {listed} and the images it names."
        )
    root = Path(image_root).expanduser()
    path = next(
        (path for path in (root / listed, root / "prompts" / listed) if path.is_file()), None
    )
    if path is None:
        raise UserError(
            f"{root / listed} is missing: put R1-V's list of {name} there (from {LISTS})."
        )
    return str(path)


def _file_rows(path: Path, split: str) -> Sequence:
    if path.suffix == ".jsonl":
        rows = _read_json_lines(path)
    elif path.suffix in FILE_FORMATS:
        rows = load_splits(str(path), FILE_FORMATS[path.suffix], data_files=str(path))["train"]
    else:
        raise UserError(
            f"{path} has an unknown format: give one of {', '.join(('.jsonl', *FILE_FORMATS))}."
        )
    is_test_set = len(rows) and "ground_truth" in _column_names(rows)
    found = _split_in_name(path) or ("test" if is_test_set else "train")
    return _pick({found: rows}, split, str(path))


def _folder_rows(folder: Path, split: str) -> Sequence:
    # A metadata.jsonl describes a folder of images for `datasets`; other lists of JSON lines are R1-V's rows.
    lists = sorted(path for path in folder.glob("*.jsonl") if path.name != "metadata.jsonl")
    if len(lists) == 1:
        return _file_rows(lists[0], split)
    if lists:
        named = [path for path in lists if (_split_in_name(path) or "train") == split]
        if len(named) != 1:
            names = ", ".join(path.name for path in lists)
            raise UserError(
                f"{folder} holds {names}, not exactly one for {split}: pass the file itself as data."
            )
        return _file_rows(named[0], split)
    if (folder / "dataset_dict.json").exists() or (
        folder / "state.json"
    ).exists():  # written by save_to_disk
        import datasets

        loaded = datasets.load_from_disk(str(folder))
        return _pick(loaded if isinstance(loaded, dict) else {"train": loaded}, split, str(folder))
    return _pick(load_splits(str(folder), str(folder.resolve())), split, str(folder))


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    # Not through `datasets`: it guesses types (dates, mixed numbers and text) and does not name the bad line.
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(
                f"line {number} of {path} is not JSON ({error}): correct or remove it."
            ) from error
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            raise UserError(
                f"line {number} of {path} is not a JSON object: write one object with columns a line."
            )
    return rows


def _pick(splits: dict[str, Sequence], split: str, source: str) -> Sequence:
    if split not in splits:
        found = ", ".join(splits)
        raise UserError(
            f"{source} has only the split {found}: for {split}, pass other data or a file named after it."
        )
    return splits[split]


def _split_in_name(path: Path) -> str | None:
    """The split whose name stands as a word in the file's name, as in `geoqa_test_prompts.jsonl`."""
    return next(
        (split for split in SPLITS if re.search(rf"(?<![a-z]){split}(?![a-z])", path.stem.lower())),
        None,
    )


def _column_names(rows: Sequence) -> list[str]:
    if isinstance(rows, list):
        return list(dict.fromkeys(name for row in rows for name in row))
    return list(rows.column_names)


def _find_columns(names: list[str], source: str) -> dict[str, str]:
    """Field of an example -> the column that holds it."""
    columns = {}
    for field, candidates in COLUMNS.items():
        columns[field] = next((name for name in candidates if name in names), None)
        if columns[field] is None:
            raise UserError(
                f"{source} has no column {' or '.join(map(repr, candidates))} (found: {', '.join(names)}): "
                f"rename the column that holds the {field}."
            )
    return columns


def _decode(cell: Any, root: Path, archive: str | None, row: str) -> Image.Image:
    """One cell (a path, encoded bytes, `{"bytes", "path"}` or a PIL image) as an upright RGB image, on white."""
    if not isinstance(cell, dict):
        cell = {"path" if isinstance(cell, str) else "bytes": cell}
    content, path, name = cell.get("bytes"), cell.get("path"), f"the image in {row}"
    if content is None:
        if not isinstance(path, str):
            raise UserError(f"{name} is neither a path nor encoded bytes: give one of them.")
        within = Path(path)
        if within.parts[:1] == (archive,) and not (root / archive).is_dir():
            within = within.relative_to(archive)
        content, name = root / within, f"image file {root / within} ({row})"
        if not content.is_file():
            raise UserError(
                f"{name} is missing: put it there, or set image_root to the folder that holds {path}."
            )
    try:
        content = io.BytesIO(content) if isinstance(content, bytes) else content
        image = content if isinstance(content, Image.Image) else Image.open(content)
        image.load()
    except Exception as error:  # Pillow raises many kinds for broken files
        raise UserError(
            f"{name} cannot be decoded ({error}): replace it or leave its row out."
        ) from error
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _inside(tag: str, text: str) -> str:
    """`<answer> 3 </answer>` -> `3`; text without the tag stays as it is."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return (found[1] if found else text).strip()


def _shuffled(size: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start … start+count−1 of an endless list: every epoch, all of 0 … size−1 in an order of its own."""
    return [
        _epoch_order(size, seed, entry // size)[entry % size]
        for entry in range(start, start + count)
    ]


@lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"epoch order {seed} {epoch}").shuffle(order)
    return order


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(
            f"split is {split!r}, but the splits are {', '.join(SPLITS)}: choose one of them."
        )


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(
            f"limit is {limit}: set it to 1 or more examples, or leave it out to use all."
        )


def configured_examples(
    config: TrainConfig, split: str, data: str | None = None, limit: int | None = None
) -> DrawnExamples | LoadedExamples:
    """The examples of a split that the settings name, or those of other `data`."""
    return load_examples(
        config.task,
        data or config.data,
        split,
        config.seed,
        config.difficulty,
        limit,
        config.image_root,
    )
