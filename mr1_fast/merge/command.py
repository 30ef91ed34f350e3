"""What `python -m mr1_fast.merge` does.

The model's files are mapped, not read: at any time only the weights of one file that is being
written are in memory, at most 2 GB of them.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..files import atomic_folder
from ..hub import model_access, model_folder
from ..model.description import read_description
from ..model.device import first_line
from ..model.model_files import weight_files
from ..model.processor import PROCESSOR_FILES, Processor, load_processor, save_source
from ..model.save import write_weights
from ..model.saved_adapter import SavedAdapter, adapter_base, adapter_folder, module_key
from .settings import MergeConfig

MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
"""Patterns of a model's files that a merge needs besides those of its processor."""


def merge_adapter(config: MergeConfig) -> None:
    """Write the model with the adapter in its weights, and say where it is.

    Everything but the adapted weights is the base's own, byte for byte. Raises UserError, and
    writes nothing, for an adapter or a model that cannot be merged.
    """
    folder = adapter_folder(config.adapter)
    if folder is None:
        raise UserError(
            f"{config.adapter} has no adapter that waits to be merged: name a folder with "
            "adapter_config.json, or final/ of a run with --save adapter."
        )
    adapter = SavedAdapter.read(folder)
    base = config.base or adapter_base(config.adapter)
    source = _base_folder(base)
    family, processor = _description(base, source)

    with ExitStack() as files:
        weights = _weights(base, source, files)
        _check_fit(base, adapter, weights)
        sizes = {name: file.get_tensor(name).nbytes for name, file in weights.items()}
        with atomic_folder(Path(config.output)) as target:
            write_weights(
                target, sizes, lambda name: adapter.merged(name, weights[name].get_tensor(name))
            )
            shutil.copyfile(source / "config.json", target / "config.json")
            save_source(processor, target, family)
    print(f"wrote {config.output}: {base} with {len(adapter.factors)} layers of {folder} merged")


def _base_folder(base: str) -> Path:
    """Return the folder of the base's files, from the hub through the local cache."""
    try:
        with model_access(base):
            return model_folder(base, (*PROCESSOR_FILES, *MODEL_FILES))
    except Exception as error:  # no network, no such name, a gated model
        raise UserError(
            f"base {base} is no local folder, and the hub did not answer with it "
            f"({first_line(error)}): check the name and the network, or name a folder with --base."
        ) from error


def _description(base: str, source: Path) -> tuple[str, Processor]:
    """Return the base's family and its processor; UserError where it cannot be a 16-bit model."""
    try:
        config = read_description(source, base)
        processor = load_processor(source, config.model_type)
    except UserError:
        raise
    except Exception as error:  # files that do not fit together fail in many ways
        raise UserError(
            f"base {base} is no whole model in Hugging Face format ({first_line(error)}): name "
            "another folder with --base."
        ) from error
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"base {base} holds quantised weights, into which nothing can be merged without loss: "
            "name the 16-bit model with --base."
        )
    return config.model_type, processor


def _weights(base: str, source: Path, files: ExitStack) -> dict[str, Any]:
    """Return the open file of every weight, by the weight's name; nothing is read yet."""
    found: dict[str, Any] = {}
    try:
        for name in weight_files(base, source):
            file = files.enter_context(safe_open(source / name, "pt"))
            found |= dict.fromkeys(file.keys(), file)
    except UserError:
        raise
    except (Exception, SafetensorError) as error:  # an index may hold anything
        raise UserError(
            f"base {base} has no whole set of safetensors files ({first_line(error)}): download "
            "it again, or name another with --base."
        ) from error
    return found


def _check_fit(base: str, adapter: SavedAdapter, weights: dict[str, Any]) -> None:
    """Raise UserError unless the model has every adapted layer, in the adapter's shape."""
    fitting = set()
    for name, file in weights.items():
        if not name.endswith(".weight"):
            continue
        fits = adapter.fits(name, file.get_slice(name).get_shape())
        if fits is False:
            raise UserError(
                f"base {base} has another shape than the adapter {adapter.folder} at {name}: name "
                "the model that it was trained on with --base."
            )
        if fits:
            fitting.add(module_key(name).removesuffix(".weight"))
    if missing := adapter.factors.keys() - fitting:
        raise UserError(
            f"base {base} has no layer {min(missing)}, which the adapter {adapter.folder} changes: "
            "name the model that it was trained on with --base."
        )
