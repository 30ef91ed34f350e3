"""Where examples come from: drawn by a task, or loaded from data.

There is one class for each source, and both have the same methods. What `take` returns depends on
the arguments alone. So a run that resumes at step n asks for step n, and needs no saved state.
"""

from collections.abc import Sequence
from pathlib import Path

from ...config import TrainConfig
from ...errors import UserError
from ...hub import hub_splits
from .. import get_task
from ..split import check_split
from .drawn import DrawnExamples
from .loaded import LoadedExamples
from .paper_sets import ARCHIVES, TEST_SETS, find_list
from .rows import SUFFIXES, file_rows, folder_rows, pick


def load_examples(
    task: str,
    data: str,
    split: str,
    seed: int,
    difficulty: int = 1,
    limit: int | None = None,
    image_root: str | None = None,
) -> DrawnExamples | LoadedExamples:
    """Return the examples of one split ("train", "validation" or "test").

    `data` is one of:
    - `drawn`, for which alone `difficulty` is used;
    - `superclevr200` or `geoqa`, a test set of the paper; `image_root` is then the folder with
      R1-V's list and the images (see paper_sets.py);
    - a .jsonl, .json, .csv, .parquet or .arrow file, which belongs to the split that its name
      mentions, or else to train (to test, if it has the columns of R1-V's test sets);
    - a folder;
    - the name of a data set on the Hugging Face Hub.

    Raises UserError, which names the way out, for a wrong argument and for data that cannot be
    read.
    """
    module = get_task(task)
    check_split(split)
    if data == "drawn":
        return DrawnExamples(module, split, seed, difficulty, limit)
    if data in TEST_SETS:
        data = find_list(data, image_root)
    path = Path(data).expanduser()
    rows = _rows(data, path, split)
    folder = path.parent if path.is_file() else path
    return LoadedExamples(
        rows,
        data,
        seed,
        limit,
        image_root or folder,
        ARCHIVES.get(path.name),
        fenced=image_root is not None,
    )


def configured_examples(
    config: TrainConfig, split: str, data: str | None = None, limit: int | None = None
) -> DrawnExamples | LoadedExamples:
    """Return the examples of a split of the data that the settings name, or of other `data`."""
    return load_examples(
        config.task,
        data or config.data,
        split,
        config.seed,
        config.difficulty,
        limit,
        config.image_root,
    )


def _rows(data: str, path: Path, split: str) -> Sequence:
    """Read the rows of a split from the file or folder `path`, or of the Hub's data set `data`."""
    if path.is_file():
        return file_rows(path, split)
    if path.is_dir():
        return folder_rows(path, split)
    looks_like_a_path = (
        path.suffix in SUFFIXES or data.startswith((".", "/", "~")) or data.count("/") > 1
    )
    if looks_like_a_path:
        raise UserError(f"{data} is missing: check the path of the data.")
    return pick(hub_splits(data), split, data)
