"""The files of a model's folder, looked at before a library reads them: what they are, what size
they have, and what their headers say of the weights. Only safetensors are read, which hold no code.
"""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PretrainedConfig

from ..errors import UserError, shortened
from ..hub import model_folder
from .sizes import least_weights

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""A model's weights in one file, and the file that names several."""
ADAPTER_CONFIG = "adapter_config.json"
"""The file of an adapter's settings."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Ends of the names of files that are read by pickle, which runs what they say."""
LARGEST_TEXT = 256 << 20
"""The most bytes of a file other than weights; the largest tokenizers have 40 MB."""
CONVERT = (
    "pickled weights can run code and are never read: have someone who trusts them save them again "
    "with save_pretrained, which writes safetensors"
)
"""The way out for weights in another format."""


def check_files(name: str | Path) -> None:
    """Raise UserError for a local folder with what nobody should read: a pipe, a device, a text of
    any length. A model on the hub has none of these."""
    if not os.path.isdir(name):
        return
    for path in _below(Path(name)):
        try:
            found = path.stat()
        except OSError:
            continue  # a link that leads nowhere is a file that is not there
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise UserError(
                f"model {name} has {path.name}, which is no regular file but a pipe or a device: "
                "remove it, or download the model again."
            )
        if found.st_size > LARGEST_TEXT and path.suffix in (".json", ".jinja", ".txt"):
            raise UserError(
                f"model {name} has {path.name} of {found.st_size >> 20} MiB, more than the "
                f"{LARGEST_TEXT >> 20} MiB that are read: download the model again."
            )


def _below(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder and in the folders of it that belong to a model."""
    yield from folder.iterdir()
    for inner in ("adapter", "additional_chat_templates"):
        if (folder / inner).is_dir():
            yield from (folder / inner).iterdir()


def check_weight_files(name: str, config: PretrainedConfig) -> None:
    """Raise UserError unless the safetensors of a model are whole, and as large as its config says.

    Only their headers are read, before any memory is asked for. Those of a model on the hub are
    downloaded into the cache, where whoever loads them next finds them.
    """
    if getattr(config, "transformers_weights", None) is not None:  # transformers would read that
        raise UserError(
            f"model {name} names another file of weights in its config.json: remove "
            f"transformers_weights there, and call the file {WEIGHTS}."
        )
    stored = 0
    folder = model_folder(name, (INDEX, ADAPTER_CONFIG))
    if not os.path.isdir(name) and (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model {name} is an adapter on the hub: download it with `hf download {name} "
            "--local-dir FOLDER`, and pass the folder."
        )
    names = weight_files(name, folder)
    folder = model_folder(name, names)
    for each in names:
        stored += sum(
            math.prod(shape) for shape in tensor_shapes(f"model {name}", folder / each).values()
        )
    needed = least_weights(config)
    packed = 2 if getattr(config, "quantization_config", None) else 1  # 4-bit numbers, two a byte
    if needed > stored * packed:
        raise UserError(
            f"model {name} has at least {needed:,} weights by its config.json, but its files hold "
            f"{stored:,}: download the model again, with the config.json that belongs to it."
        )


def weight_files(name: str, folder: Path) -> list[str]:
    """Return the names of a model's files of weights, which lie in `folder` itself.

    One file counts more than an index, as where transformers loads a model. Raises UserError for an
    index of anything else, and ValueError for one that is no JSON.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [WEIGHTS]
    found = json.loads(index.read_text("utf-8"))
    found = found.get("weight_map") if isinstance(found, Mapping) else None
    named = list(found.values()) if isinstance(found, Mapping) else []
    if not named or not all(isinstance(each, str) for each in named):
        raise UserError(f"model {name} has an {INDEX} that names no files: download it again.")
    for each in set(named):
        check_name(name, each)
    return sorted(set(named))


def check_name(name: str, file: str) -> None:
    """Raise UserError for a name in an index that is no file of safetensors in the folder itself.

    name: the model, as a message calls it.
    """
    if file != os.path.basename(file) or file in ("", ".", "..") or "\0" in file:
        raise UserError(
            f"model {name} has an index of its weights that names {shortened(file, 60)}, outside "
            "its folder: download it again."
        )
    if file.endswith(PICKLED):
        raise UserError(f"model {name} has weights in {shortened(file, 60)}: {CONVERT}.")
    if not file.endswith(".safetensors"):
        raise UserError(
            f"model {name} has an index of its weights that names {shortened(file, 60)}, which is "
            "no file of safetensors: download it again."
        )


def tensor_shapes(name: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a file of safetensors, of which the header alone is read.

    Raises UserError, which calls the model or adapter `name`, for a file that is not there, is
    another kind of file, or is damaged.
    """
    if not path.is_file():
        pickled = [each.name for each in sorted(path.parent.glob("*")) if _is_weights(each)]
        if pickled:
            raise UserError(f"{name} has its weights in {shortened(pickled[0], 60)}: {CONVERT}.")
        raise UserError(
            f"{name} has no {path.name}: copy it into its folder (weights in other formats, such "
            "as .bin and .pt, are never read)."
        )
    try:
        # It checks that the header is whole, and that each tensor lies within the file.
        with safe_open(path, "pt") as file:
            keys = file.keys()
            return {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except Exception as error:
        reason = shortened(error, 100)
        raise UserError(
            f"{name} has a damaged {path.name} ({reason}): download or copy it again."
        ) from error


def _is_weights(path: Path) -> bool:
    """Whether a file has the name of pickled weights, and not of a trainer's own state."""
    ours = path.name.startswith(("pytorch_model", "model", "adapter_model", "consolidated"))
    return ours and path.suffix in PICKLED


def read_json(path: Path) -> Any:
    """Return what a file of JSON holds; ValueError for one that is damaged or too deep."""
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
