"""LoRA adapters on disk, in PEFT's format: where they lie, and merging one into its model.

W' = W + s·B·A,   s = α/r, or α/√r with rsLoRA   (Hu et al., arXiv 2106.09685, section 4.1)
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..bounded import Refused, bounded
from ..errors import UserError, shortened
from .model_files import ADAPTER_CONFIG, check_files, read_json, tensor_shapes

ADAPTER_FOLDER = "adapter"
"""Where the final folder of a run keeps its adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The file of an adapter's tensors."""
MOST_ADAPTERS = 8
"""How many adapters may lie on each other."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways in which PEFT starts an adapter that change the model under it, too."""
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
)
"""Settings of PEFT's LoraConfig which, if they are set, make a layer compute something else."""
_PLAIN = ("use_dora", "fan_in_fan_out", "lora_bias", "alpha_pattern", "layer_replication")
"""Those which, if they are set, make an adapter another one than W + s·B·A with one α."""
_OF_PEFT = (
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "r", "lora_alpha"),
    *("lora_dropout", "use_rslora", "use_dora", "bias", "lora_bias", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
)
"""The settings of an adapter that PEFT is given. Others name modules to import or layers to repeat;
an adapter that needs one then lacks tensors, which is found, or is refused by `_require_lora`."""


def adapter_folder(name: str) -> Path | None:
    """Return the folder of the adapter that the model `name` consists of; None for any other.

    That is the folder `name` itself, or `name/adapter` where `name` has no model of its own.
    """
    folder = Path(name)
    if os.path.isfile(folder / ADAPTER_CONFIG):  # which a name of any length is asked by
        return folder
    inner = folder / ADAPTER_FOLDER
    is_adapter = os.path.isfile(inner / ADAPTER_CONFIG)
    return inner if is_adapter and not os.path.isfile(folder / "config.json") else None


def adapter_base(name: str) -> str | None:
    """Return the name of the model under the adapter in folder `name`, or None if it holds none.

    Raises UserError where the adapter does not name it, where its folder is gone, or where too many
    adapters lie on each other, as do those that name each other.
    """
    below = _models_below(name)
    return below[0] if below else None


def model_under(name: str) -> str:
    """Return the model that lies under all adapters of the model `name`, which may be that itself.

    Raises UserError as adapter_base does.
    """
    return [name, *_models_below(name)][-1]


def _models_below(name: str) -> list[str]:
    """Return the model under the adapter `name`, the one under that if it is another adapter, …"""
    below: list[str] = []
    while base := _base([name, *below][-1]):
        if len(below) == MOST_ADAPTERS:
            raise UserError(
                f"the adapter {shortened(name, 200)} lies on itself, or on more than "
                f"{MOST_ADAPTERS} others: correct base_model_name_or_path in its {ADAPTER_CONFIG}."
            )
        below.append(base)
    return below


def _base(name: str) -> str | None:
    """Return the model that the adapter in folder `name` names itself; None if it holds none."""
    folder = adapter_folder(name)
    if folder is None:
        return None
    base = read_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(
            f"the adapter {folder} does not name the model under it: write its name or folder as "
            "base_model_name_or_path into adapter_config.json."
        )
    if Path(base).is_absolute() and not os.path.isdir(base):
        raise UserError(
            f"the adapter {folder} belongs to the model {shortened(base, 200)}, which is not "
            "there: put it back, or write its new place as base_model_name_or_path into "
            "adapter_config.json."
        )
    return base


def read_config(folder: Path) -> dict:
    """Read an adapter's settings; UserError for a file that is damaged."""
    check_files(folder)
    path = folder / ADAPTER_CONFIG
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        reason = shortened(error, 100)
        raise UserError(f"{path} cannot be read ({reason}): train or copy it again.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no JSON object: train or copy it again.")
    return settings


def settings_for_peft(folder: Path) -> dict:
    """Return the settings of an adapter that PEFT may be given, held against its tensors.

    Raises UserError for an adapter that is no LoRA, whose weights are pickled, damaged or of other
    ranks than its settings say, or whose settings no adapter has.
    """
    settings = read_config(folder)
    _require_lora(folder, settings)
    shapes = tensor_shapes(f"the adapter {folder}", folder / ADAPTER_WEIGHTS)
    stored = [
        shape[1] if "_B." in key or key.endswith("_B") else shape[0]
        for key, shape in shapes.items()
        if ".lora_" in key and len(shape) == 2
    ]
    named = [settings.get("r", 8), *_values(folder, settings, "rank_pattern")]
    for rank in named:
        if type(rank) is not int or not 1 <= rank <= max(stored, default=0):
            raise UserError(
                f"the adapter {folder} has the rank {shortened(rank, 40)} in its {ADAPTER_CONFIG}, "
                f"but its tensors have ranks up to {max(stored, default=0)}: train or copy it "
                "again."
            )
    _check_alphas(folder, settings)
    return {key: settings[key] for key in _OF_PEFT if key in settings}


def _require_lora(folder: Path, settings: dict) -> None:
    """Raise UserError for an adapter that is more than LoRA over the model as it was published."""
    kind, start = settings.get("peft_type"), settings.get("init_lora_weights")
    odd = ""
    if kind != "LORA":
        odd = f"is of the type {shortened(kind, 40)}"
    elif str(start).startswith(_CHANGES_BASE):
        odd = f"was begun by {shortened(start, 40)}, which changed the model under it"
    elif variants := [name for name in _VARIANTS if settings.get(name)]:
        odd = f"has {variants[0]}, by which its layers compute something else"
    if odd:
        raise UserError(
            f"the adapter {folder} {odd}, but mr1_fast reads LoRA alone: merge it with PEFT's "
            "merge_and_unload, and pass the merged model."
        )


def check_patterns(folder: Path, settings: dict, modules: list[str]) -> None:
    """Raise UserError where the patterns of an adapter's settings cannot be matched with the names
    of a model's modules in bounded time, or are none."""
    whole = [settings.get("target_modules"), settings.get("exclude_modules")]
    patterns = [each for each in whole if isinstance(each, str)]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns += [rf"(.*\.)?({each})$" for each in settings.get(key) or ()]
    layers = settings.get("layers_pattern") or ()
    layers = [layers] if isinstance(layers, str) else layers
    patterns += [rf".*\.[^.]*{each}\.(\d+)\." for each in layers]
    try:
        bounded(lambda: [bool(re.fullmatch(p, name)) for p in patterns for name in modules][:0])
    except Refused as error:
        raise UserError(
            f"the adapter {folder} has patterns of module names that cannot be used "
            f"({shortened(error, 100)}): name the modules one by one as target_modules in its "
            f"{ADAPTER_CONFIG}."
        ) from error


def _values(folder: Path, settings: dict, key: str) -> list:
    """Return the values of a mapping in an adapter's settings, which may be empty or null."""
    values = settings.get(key) or {}
    if not isinstance(values, dict):
        raise UserError(
            f"the adapter {folder} has {key} = {shortened(values, 40)}, which must be a mapping: "
            "train or copy it again."
        )
    return list(values.values())


def _check_alphas(folder: Path, settings: dict) -> None:
    """Raise UserError unless each α of an adapter is a finite number."""
    for alpha in [settings.get("lora_alpha", 8), *_values(folder, settings, "alpha_pattern")]:
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or abs(alpha) > 1e6 or not math.isfinite(alpha):
            raise UserError(
                f"the adapter {folder} has lora_alpha = {shortened(alpha, 40)}, which must be a "
                "finite number up to a million: train or copy it again."
            )


def earlier_names(stored: Mapping[str, str]) -> dict[str, str]:
    """Return how earlier versions of transformers named modules, as PEFT's `key_mapping`: patterns
    of the beginning of a name, and what stands there today.

    stored: a family's `stored_names`, since the files of models kept those names.
    """
    today = "|".join(map(re.escape, stored))
    return {rf"^(?!{today}){re.escape(earlier)}": name for name, earlier in stored.items()}


def with_todays_name(tensor: str, mapping: Mapping[str, str]) -> str:
    """Return the name of an adapter's tensor as PEFT reads it with a `key_mapping`."""
    prefix, name = re.fullmatch(r"((?:base_model\.)?(?:model\.)?)(.*)", tensor).groups()
    for pattern, replacement in mapping.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return prefix + name


def module_key(name: str) -> str:
    """Return what is the same in all names of a module, such as `layers.0.mlp.up_proj`.

    Files of different ages and the module in memory differ in what comes before it: `model.`,
    `model.language_model.`, `base_model.model.model.`, and for the vision tower `visual.`.
    """
    return re.sub(r"^(base_model\.|model\.|language_model\.)+", "", name)


@dataclass
class SavedAdapter:
    """A LoRA adapter, read from its files."""

    folder: Path
    settings: dict
    """PEFT's, of adapter_config.json."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """A (r, in) and B (out, r) of each layer, by its `module_key`."""

    @classmethod
    def read(cls, folder: Path) -> "SavedAdapter":
        """Read an adapter; UserError for one that is damaged, or that is not plainly W + s·B·A."""
        settings = read_config(folder)
        _check_plain(folder, settings)
        _check_alphas(folder, settings)
        path = folder / ADAPTER_WEIGHTS
        tensor_shapes(f"the adapter {folder}", path)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}): train or copy it again.") from error

        factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            found = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
            if not found or tensor.ndim != 2:
                raise _cannot_merge(folder, f"it holds {name}")
            factors.setdefault(module_key(found[1]), {})[found[2]] = tensor
        for module, pair in factors.items():
            if pair.keys() != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
                raise UserError(
                    f"the adapter {folder} is damaged at {module}, where its two factors do not "
                    "fit together: train or copy it again."
                )
        if not factors:
            raise UserError(f"{path} holds no adapter: train or copy it again.")
        return cls(folder, settings, {name: (p["A"], p["B"]) for name, p in factors.items()})

    def fits(self, name: str, shape: list[int]) -> bool | None:
        """Whether a weight (out, in) of the model has the adapter's shape; None if it has none."""
        pair = self.factors.get(module_key(name).removesuffix(".weight"))
        return None if pair is None else list(shape) == [len(pair[1]), pair[0].shape[1]]

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight of the model with its part of the adapter, in its own dtype.

        It is computed in fp32 and rounded once. A weight without a part comes back as it is.
        """
        pair = self.factors.get(module_key(name).removesuffix(".weight"))
        if pair is None or not name.endswith(".weight"):
            return weight
        low, high = (factor.to(weight.device, torch.float32) for factor in pair)
        alpha = self.settings.get("lora_alpha", 8)
        rank = len(low)
        scale = alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)
        return torch.addmm(weight.float(), high, low, alpha=scale).to(weight.dtype)


def _check_plain(folder: Path, settings: dict) -> None:
    """Raise UserError for an adapter whose settings say that it is more than W + s·B·A."""
    if settings.get("peft_type") != "LORA":
        raise _cannot_merge(folder, f"its peft_type is {settings.get('peft_type')}")
    for name in (*_VARIANTS, *_PLAIN):
        if settings.get(name):
            raise _cannot_merge(folder, f"{name} is set")
    if settings.get("bias", "none") != "none":
        raise _cannot_merge(folder, f"bias is {settings['bias']}")
    if str(settings.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise _cannot_merge(folder, f"init_lora_weights is {settings['init_lora_weights']}")


def _cannot_merge(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the adapter {folder} is no plain LoRA ({reason}): merge it with PEFT's merge_and_unload, "
        "which holds the whole model in memory."
    )
