"""Bytes that several phases have in common: a pack on the device, its images, and the LM head."""

from dataclasses import dataclass

from torch import Tensor

from ..kernels.grpo.linear import CHUNK_BYTES, SLICE, rows_per_chunk
from ..types import PackedBatch
from .memory_use import MemoryUse
from .meta_model import MetaModel
from .planned_run import PlannedRun
from .workload import patches_of

ROW_RESULTS = 4 * 8
"""Bytes that the loss keeps for each row: eight numbers in fp32."""


def pixel_bytes(model: MetaModel, patches: int) -> int:
    """Bytes of the pixels of so many patches, in fp32."""
    return 4 * model.patch_size * patches


def pack_bytes(run: PlannedRun, batch: PackedBatch) -> int:
    """Bytes of a pack's own tensors on the device, with its rotary angles and attention masks.

    A pack that is computed on a CPU is not copied: only its angles and masks are new.
    """
    model = run.policy
    tokens, patches = batch.input_ids.numel(), int(patches_of(batch).sum())
    angles = 2 * tokens * model.head_dim * model.itemsize + model.angle_bytes(patches)
    if run.device == "cuda":
        integers = 5 * tokens + 3 * len(batch.segments.key_rows)
        return angles + pixel_bytes(model, patches) + 8 * integers
    masks = [r.visible for r in batch.segments.padded.rectangles if r.visible is not None]
    return angles + sum(mask.numel() * (1 + model.itemsize) for mask in masks)


def encode_images(
    model: MetaModel, images: Tensor, others: int, copies_pixels: bool
) -> list[MemoryUse]:
    """Bytes at the peak of encoding images without gradients; an empty list if there are none.

    `images` (I,) int64 are the patches of each image, `others` the bytes of activations that are
    there already. `copies_pixels`: the pixels are copied, to the device or into one tensor.
    """
    if not len(images):
        return []
    tower, patches = model.vision_tower(images), int(images.sum())
    pixels = pixel_bytes(model, patches) if copies_pixels else 0
    hidden = patches * model.vision_width * model.itemsize
    kept = model.angle_bytes(patches) + hidden
    most = max(tower.embedding.infer, kept + tower.blocks.infer, kept + tower.merger.infer)
    return [{"activations": others + pixels + most}]


@dataclass(frozen=True)
class HeadBytes:
    """Bytes that the LM head and the loss allocate on the rows of one pack."""

    most: int
    """Most bytes at once, in the forward pass, which computes the gradients, too."""
    kept: int
    """Bytes that are kept for the backward pass."""


def loss_head(run: PlannedRun, rows: int, trains: bool) -> HeadBytes:
    """Bytes of kernels/grpo/linear.py on so many rows with loss, or of log-probabilities alone."""
    model = run.policy
    chunk = rows_per_chunk(rows, model.vocabulary, model.itemsize, CHUNK_BYTES[run.device])
    logits = chunk * model.vocabulary * model.itemsize
    results = ROW_RESULTS * rows
    if not trains:
        return HeadBytes(logits + results, 0)

    dhidden = model.hidden_bytes(rows)
    if not model.trains_head:
        return HeadBytes(dhidden + results + logits, dhidden + results)
    kept = dhidden + results + model.head_bytes
    if model.itemsize == 4 or chunk == rows:
        return HeadBytes(kept + logits, kept)

    # Over several chunks, the gradient of a 16-bit head is summed in fp32.
    casts = 0
    if run.device == "cpu":
        columns = min(model.vocabulary, 2 * SLICE)  # a slice is made while the last one exists
        casts = 4 * chunk * (columns + model.width)
    accumulator = 2 * model.head_bytes
    most = dhidden + results + accumulator + max(logits + casts, model.head_bytes)
    return HeadBytes(most, kept)
