"""Packs without loss, by which processes whose passes are collective make equally many alike.

Under `--sharding full` every layer's weights are gathered from all processes when it runs. So all
of them must run the same layers equally often, also one that has fewer packs, or no image in one.
An idle pack is one token, or one image of a token, that no row of the loss looks at: it has no
rows, so that losses, metrics and gradients with it are those without.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..distributed import World
from ..packing import pack
from ..segments import Segments
from ..types import PackedBatch, Prompt
from .families import base_model, vision_tower


def idle_pack(model: nn.Module, with_image: bool) -> PackedBatch:
    """Make the smallest pack that runs all text layers, and the vision tower if it has an image."""
    first, pixels, grid = 0, None, None
    if with_image:
        config, embed = base_model(model).config, vision_tower(model).patch_embed
        side = config.vision_config.spatial_merge_size
        first, grid = config.image_token_id, torch.tensor([[1, side, side]])
        pixels = torch.zeros(side * side, embed.proj.weight[0].numel())
    position = torch.zeros(3, 1, dtype=torch.int64)
    prompt = Prompt(torch.tensor([first]), position, 1, pixels, grid, int(with_image))
    return pack([prompt], [torch.zeros(0, dtype=torch.int64)], [0])


def aligned(
    world: World, batches: Sequence[PackedBatch], without: PackedBatch, image: PackedBatch | None
) -> list[PackedBatch]:
    """Return the packs and idle ones behind them, until all processes have equally many.

    Where a process has images, each pack without any gets an idle one beside its own tokens.

    without, image: idle packs without and with an image; None for a model of text alone.
    """
    has_images = any(batch.pixel_values is not None for batch in batches)
    names = {name for batch in batches for name in batch.row_data}
    everyone = world.gather((len(batches), has_images, names))
    idle = image if any(has for _, has, _ in everyone) else without
    rows = {name: torch.zeros(0) for _, _, names in everyone for name in names}
    missing = max(count for count, _, _ in everyone) - len(batches)
    return [
        *(_with_image(batch, idle) for batch in batches),
        *(replace(idle, row_data=dict(rows)) for _ in range(missing)),
    ]


def _with_image(batch: PackedBatch, idle: PackedBatch) -> PackedBatch:
    """Put an idle pack behind the tokens of a pack, if it has an image and the pack has none."""
    if idle.pixel_values is None or batch.pixel_values is not None:
        return batch
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, idle.input_ids]),
        position_ids=torch.cat([batch.position_ids, idle.position_ids], dim=1),
        segments=_one_behind_the_other([batch.segments, idle.segments]),
        pixel_values=idle.pixel_values,
        image_grid_thw=idle.image_grid_thw,
    )


def _one_behind_the_other(parts: Iterable[Segments]) -> Segments:
    """Return the segments of packs that are laid end to end."""
    rows, start = [], 0
    for part in parts:
        lengths, queries = part.cu_seqlens_k.diff().tolist(), part.cu_seqlens_q.diff().tolist()
        keys = (part.key_rows + start).split(lengths)
        rows += zip(keys, queries, strict=True)
        start += part.num_tokens
    return Segments.build(rows)
