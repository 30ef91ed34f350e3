"""Where examples come from: drawn by a task, or loaded from data.

There is one class for each source, and both have the same methods. What `take` returns depends on
the arguments alone. So a run that resumes at step n asks for step n, and needs no saved state.
"""

import os
from dataclasses import replace
from pathlib import Path

from ...config import TrainConfig
from ...errors import UserError
from .. import get_task
from ..split import SPLITS
from .drawn import DrawnExamples
from .loaded import LoadedExamples
from .options import DEFAULTS, DataOptions
from .paper_sets import ARCHIVES, TEST_SETS, find_list
from .rows import read_rows
from .splits import choose_split


def load_examples(
    task: str,
    data: str,
    split: str,
    seed: int,
    difficulty: int = 1,
    limit: int | None = None,
    image_root: str | None = None,
    options: DataOptions = DEFAULTS,
) -> DrawnExamples | LoadedExamples:
    """Return the examples of one split: train, validation, test, or one that the data names so.

    `data` is one of:
    - `drawn`, for which alone `difficulty` is used;
    - `superclevr200` or `geoqa`, a test set of the paper; `image_root` is then the folder with
      R1-V's list and the images (see paper_sets.py);
    - a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, all of which is the split that is asked
      for, whatever its name;
    - a folder;
    - the name of a data set on the Hugging Face Hub.

    Raises UserError, which names the way out, for a wrong argument and for data that cannot be
    read.
    """
    module = get_task(task)
    if data == "drawn":
        split = choose_split(SPLITS, split, options, "drawn data")
        return DrawnExamples(module, split, seed, difficulty, limit)
    if data in TEST_SETS:
        data = find_list(data, image_root)
    path = Path(os.path.expanduser(data))
    if path.name in ARCHIVES and split == "train" and options.split is None:
        raise UserError(f"{data} is a test set of the paper: for train, pass other data.")
    return LoadedExamples(
        read_rows(data, path, split, options),
        data,
        seed,
        limit,
        image_root or (path.parent if path.is_file() else path),
        ARCHIVES.get(path.name),
        options,
        fenced=image_root is not None,
    )


def configured_examples(
    config: TrainConfig, split: str, data: str | None = None, limit: int | None = None
) -> DrawnExamples | LoadedExamples:
    """Return the examples of a split of the data that the settings name, or of other `data`.

    All splits but train are held out: they are never the rows of --data that are trained on.
    """
    options = DataOptions.of(config)
    if split != "train":
        trained = (options.split or "train") if data is None else None
        options = replace(options, split=config.eval_split, held_out=True, trained=trained)
    return load_examples(
        config.task,
        data or config.data,
        split,
        config.seed,
        config.difficulty,
        limit,
        config.image_root,
        options,
    )
