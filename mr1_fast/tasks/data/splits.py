"""Which split is meant: the Hub's words for training, validation and test data.

They are those of https://huggingface.co/docs/hub/datasets-file-names-and-splits.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from .options import DataOptions

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words that name a split, by the split."""

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
"""The end of the name of a file that holds a part of a split."""

_SPLITS = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_WORD = re.compile(r"[^-._ 0-9]+")
"""A word of a file name: the Hub has these delimiters."""


def split_in_name(path: Path, own_names: Sequence[str | None] = ()) -> str | None:
    """Return the split that a file's path within the data mentions, as `val` in `my_val_2.jsonl`.

    A file or folder that has one of `own_names` is the split of that name. A word of the file's
    name counts before one of its folders, and train before validation before test where one name
    mentions two.
    """
    names = (SHARD.sub("", path.stem), *(folder.name for folder in path.parents))
    for name in names:
        if name and name in own_names:
            return name
    for name in names:
        mentioned = {_SPLITS.get(word) for word in _WORD.findall(name.lower())}
        for split in SPLIT_WORDS:
            if split in mentioned:
                return split
    return None


def choose_split(found: Sequence[str], split: str, options: DataOptions, source: str) -> str:
    """Return which of the splits `found` in the data `source` is the wanted one.

    `split` is the name of a split, or another word that the Hub has for it; `options` may say
    otherwise. Raises UserError, which lists the splits, if there is no such split.
    """
    wanted = [options.split or split]
    if options.held_out and options.split is None:
        wanted = ["test", "validation"]
    trained = options.trained and _named(found, options.trained)
    matches = [_named(found, name) for name in wanted]
    match = next((name for name in matches if name not in (None, trained)), None)
    if match is not None:
        return match
    flag = "--data-split" if split == "train" else "--eval-split (--split in mr1_fast.evaluate)"
    listed = f"split{'s' * (len(found) > 1)} {', '.join(found)}"
    if list(found) == [trained]:
        raise UserError(f"{source} has only the {listed}: for {wanted[0]}, pass other data.")
    if trained is not None and trained in matches:
        raise UserError(
            f"{source} has the {listed}, and {trained} is trained on: for {split}, name another "
            f"with {flag}, or pass other data."
        )
    raise UserError(
        f"{source} has only the {listed}: for {wanted[0]}, pass other data, or name a split with "
        f"{flag}."
    )


def _named(found: Sequence[str], name: str) -> str | None:
    """Return the split of that name, or else the first one that another word of the Hub names."""
    if name in found:
        return name
    split = _SPLITS.get(name.lower(), name)
    return next((each for each in found if _SPLITS.get(each.lower()) == split), None)
