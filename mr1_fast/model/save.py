"""Saving a policy so that it loads everywhere: weights, adapter, and its processor's own files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from ..config import TrainConfig
from ..errors import UserError
from .families import Family, base_model, family_of
from .fsdp import whole_tensor
from .policy import Policy
from .processor import save_source
from .saved_adapter import ADAPTER_FOLDER, adapter_folder

SHARD_BYTES = 2 * 10**9
"""Largest file of weights. What is made for a file, such as merged weights, waits in memory until
it is written."""


def check_save(config: TrainConfig) -> None:
    """Raise UserError where an adapter is to be saved that would have no model on disk under it."""
    saves_adapter = config.save in ("adapter", "both")
    if saves_adapter and not config.load_in_4bit and adapter_folder(config.model):
        raise UserError(
            f"save is {config.save}, but model {config.model} is an adapter itself, and a second "
            f"one would lie on no model: first run `python -m mr1_fast.merge {config.model} "
            "--output FOLDER`, and train FOLDER."
        )


def save_pretrained(policy: Policy, folder: Path | None, save: str | None = None) -> None:
    """Save a policy in Hugging Face format, with the processor's files of the model it began as.

    folder: None for a process that writes nothing, but has weights that the first one writes, where
    they are in parts on all processes; then all come here.

    save: what is written of a policy with LoRA adapters: "merged", the model with the adapters in
    its weights; "adapter", those alone, in `folder/adapter`; or "both". None is the merged model,
    and over 4-bit weights, which cannot be merged without loss, the adapter.
    """
    model, base = policy.model, base_model(policy.model)
    is_cut = any(isinstance(parameter, DTensor) for parameter in base.parameters())
    if folder is None and not is_cut:
        return
    if base is model and not is_cut:
        with _written_generation_config(model):
            model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    elif base is model:
        _save_merged(base, folder)
    else:
        save = save or ("adapter" if getattr(base, "is_loaded_in_4bit", False) else "merged")
        if save != "adapter":
            _save_merged(base, folder)
        if save != "merged" and folder is not None:
            _save_adapter(model, base, folder / ADAPTER_FOLDER)
    if folder is None:
        return
    save_source(policy.processor, folder, base.config.model_type)
    if (folder / "config.json").is_file():
        _keep_config(policy.processor.source, folder, base.dtype)


def write_weights(
    folder: Path | None,
    sizes: Mapping[str, int],
    make: Callable[[str], Tensor],
    shard: int | None = None,
) -> None:
    """Write tensors as safetensors files of at most `shard` bytes, by default SHARD_BYTES.

    sizes: the bytes of each tensor; make: gives a tensor by its name. Only the tensors of one file
    exist at a time. Without a folder each is made in the same order, and let go of.
    """
    plan = split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard or SHARD_BYTES,
    )
    for file, names in plan.filename_to_tensors.items():
        if folder is None:
            for name in names:
                make(name)
            continue
        tensors = {name: make(name).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    if plan.is_sharded and folder is not None:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def _save_merged(base: nn.Module, folder: Path | None) -> None:
    """Write the model with its adapters merged into the weights; it stays as it is itself."""
    config, family = base.config, family_of(base.config)
    if folder is not None:
        # FSDP2 puts its name before that of the class.
        config.architectures, config.dtype = [type(base).__name__.removeprefix("FSDP")], base.dtype
        config.save_pretrained(folder)
        with _written_generation_config(base):
            base.generation_config.save_pretrained(folder)

    weights, adapted = {}, {}
    for name, weight in base.state_dict().items():
        if ".lora_" not in name:
            weights[_stored_name(name, family)] = weight
    if base.lm_head.weight is base.get_input_embeddings().weight:
        del weights["lm_head.weight"]
    for name, module in base.named_modules():
        if hasattr(module, "lora_A"):
            adapted[_stored_name(f"{name}.weight", family)] = module

    def make(name: str) -> Tensor:
        module = adapted.get(name)
        weight = whole_tensor(weights[name].detach())
        if module is None:
            return weight.cpu() if isinstance(weights[name], DTensor) else weight
        for adapter in module.active_adapters:
            weight = (weight + module.get_delta_weight(adapter).detach()).to(weight.dtype)
        # A card that is full of training has room for one layer, not for a file.
        return weight.cpu()

    write_weights(folder, {name: weight.nbytes for name, weight in weights.items()}, make)


@contextmanager
def _written_generation_config(model: nn.Module) -> Iterator[None]:
    """Have a generation config within a block that transformers writes.

    Some versions refuse one with, for example, `top_k` but no `do_sample`, as models have been
    published, and with it all of the model. The model's own file takes its place afterwards.
    """
    own = model.generation_config
    try:
        with TemporaryDirectory() as folder:
            own.save_pretrained(folder)
    except ValueError:
        ends = dict(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id)
        model.generation_config = GenerationConfig(**ends)
    try:
        yield
    finally:
        model.generation_config = own


def _keep_config(source: str | None, folder: Path, dtype: torch.dtype) -> None:
    """Put the config.json of the model that training began with in the place of transformers' own.

    What reads that model then reads this one, too, also if it knows only older settings. It stays
    transformers' own where weights have been trained in another dtype.
    """
    config = Path(source or "") / "config.json"
    if source is None or not config.is_file():
        return
    settings = json.loads(config.read_text("utf-8"))
    if settings.get("dtype", settings.get("torch_dtype")) == str(dtype).removeprefix("torch."):
        shutil.copyfile(config, folder / "config.json")


def _stored_name(name: str, family: Family) -> str:
    """Return the name that a weight has in files: that of the models on the hub."""
    name = name.replace(".base_layer.", ".")
    for inner, stored in family.stored_names.items():
        if name.startswith(inner):
            return stored + name.removeprefix(inner)
    return name


def _save_adapter(model: nn.Module, base: nn.Module, folder: Path) -> None:
    """Write the adapter in PEFT's format, with a name of its model that holds from any folder."""
    name = base.name_or_path
    for config in model.peft_config.values():
        config.base_model_name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
    # Without a look for trained embeddings, for which PEFT asks the Hub for the base's config.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, not filled in
