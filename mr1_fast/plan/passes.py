"""Bytes that several phases have in common: a pack on the device, its images, and the LM head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.grpo.chunks import CHUNK_BYTES, chunk_rows
from ..kernels.grpo.head import slice_rows, sums_in_fp32
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
    patches = int(patches_of(batch).sum())
    pixels = pixel_bytes(run.policy, patches) if run.device == "cuda" else 0
    return token_bytes(run, batch) + run.policy.angle_bytes(patches) + pixels


def token_bytes(run: PlannedRun, batch: PackedBatch) -> int:
    """The part of `pack_bytes` that has nothing to do with images."""
    model, tokens = run.policy, batch.input_ids.numel()
    angles = 2 * tokens * model.head_dim * model.itemsize
    if run.device == "cuda":
        return angles + 8 * (5 * tokens + 3 * len(batch.segments.key_rows))
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
    # transformers' tower holds the first block's input until the last block has run.
    angles, deepstack = model.angle_bytes(patches), tower.deepstack
    blocks = max(tower.blocks.infer, 2 * tower.hidden + deepstack.merger.infer)
    most = max(
        tower.embedding.infer,
        angles + tower.hidden + blocks + deepstack.features,
        angles + tower.merger.infer + deepstack.features,
    )
    return [{"activations": others + pixels + most}]


def deepstack_bytes(model: MetaModel, images: Tensor) -> int:
    """Bytes of the deepstack features of images, which wait for the decoder's first layers."""
    return model.vision_tower(images).deepstack.features if len(images) else 0


@dataclass(frozen=True)
class HeadBytes:
    """Bytes that the LM head and the loss allocate on the rows of one pack."""

    most: int
    """Most bytes at once, in the forward pass, which computes the gradients, too."""
    kept: int
    """Bytes that are kept for the backward pass."""


def loss_head(run: PlannedRun, rows: int, trains: bool, in_one_pass: bool = True) -> HeadBytes:
    """Bytes of kernels/grpo/linear.py on so many rows with loss, or of log-probabilities alone.

    A GPU that is not at hand is taken to use the largest chunks. A loss that is not computed
    `in_one_pass` takes its log-probabilities first; what it allocates most at once, it does in the
    backward, where the final norm has freed nothing yet.
    """
    if not in_one_pass:
        forward, backward = loss_head(run, rows, trains=False), loss_head(run, rows, trains)
        return HeadBytes(max(forward.most, backward.most), backward.kept)
    model = run.policy
    trains_head = trains and model.trains_head
    chunk = chunk_rows(
        torch.device(run.device),
        rows,
        model.vocabulary,
        model.width,
        model.itemsize,
        CHUNK_BYTES[run.device],
        trains_hidden=trains,
        trains_head=trains_head,
    )
    logits = chunk * model.vocabulary * model.itemsize
    results = ROW_RESULTS * rows
    if not trains:
        return HeadBytes(logits + results, 0)

    dhidden = model.hidden_bytes(rows)
    if not trains_head:
        return HeadBytes(dhidden + results + logits, dhidden + results)
    kept = dhidden + results + model.head_bytes
    if model.itemsize == 4:
        return HeadBytes(kept + logits, kept)

    # A CPU computes the gradient of a 16-bit head in fp32 copies, a slice at a time.
    in_fp32, casts = sums_in_fp32(rows, chunk), 0
    if run.device == "cpu":
        part = min(model.vocabulary, slice_rows(model.width))
        casts = 4 * (chunk * (part + model.width) + part * model.width * (not in_fp32))
    if not in_fp32:
        return HeadBytes(kept + logits + casts, kept)
    total = 2 * model.head_bytes
    return HeadBytes(dhidden + results + total + max(logits + casts, model.head_bytes), kept)
