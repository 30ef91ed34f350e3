"""The forward pass over several packs at once: a layer over all of them, then the next layer.

Weights that have to be copied to the device are copied once, however many packs there are. Between
two layers, a pack's hidden state waits on the device, or in host memory where the states of all
packs would take too much; its deepstack features wait with it. The numbers are those of
`packed_hidden`, pack by pack.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..types import PackedBatch
from .families import (
    base_model,
    deepstack_mergers,
    patches_per_token,
    text_model,
    vision_tower,
)
from .forward import (
    add_deepstack,
    final_hidden,
    image_rows,
    place_features,
    text_angles,
    text_layer,
    vision_layer,
)
from .layer_stream import LayerStream
from .recompute import Carry, summed
from .vision import BlockCall, begin_patches, merge_patches


def states_wait_on_device(
    model: nn.Module, batches: Sequence[PackedBatch], streamed: int, gradients: int
) -> bool:
    """Return whether the hidden states of all packs wait on the device between two layers.

    They do if they and the `streamed` bytes of weights are no more than the bytes of the gradients
    that the update will have in their place: then the pass needs no more memory than the update.
    The memory plan asks the same, for a `model` without data.
    """
    return streamed + sum(state_bytes(model, batch) for batch in batches) <= gradients


def state_bytes(model: nn.Module, batch: PackedBatch) -> int:
    """Return the bytes of a pack's state between two layers, where they are most.

    That is its hidden state and its deepstack features, which are all there from the tower's last
    block to the first text layer.
    """
    embedding = text_model(model).embed_tokens.weight
    width, in_tower, deepstack = embedding.shape[1], 0, 0
    if batch.pixel_values is not None:
        tower, patches = vision_tower(model), len(batch.pixel_values)
        in_tower = patches * tower.patch_embed.proj.out_channels
        tokens = patches // patches_per_token(base_model(model).config)
        deepstack = len(deepstack_mergers(tower)) * tokens * width
    hidden = max(in_tower, batch.input_ids.numel() * width)
    return (hidden + deepstack) * embedding.itemsize


def run_by_layers(
    model: nn.Module,
    batches: Sequence[PackedBatch],
    stream: LayerStream,
    head: Callable[[Tensor, PackedBatch], Tensor],
    fused: bool = True,
    wait_on_device: bool = True,
) -> list[Tensor]:
    """Compute `head(hidden, batch)` of each pack and its final hidden states (N, D), as they come.

    The packs may be anywhere; each is moved to the device when it begins, its pixels only until
    they are embedded. To be called within the context of the stream and without gradients.
    """
    text = text_model(model)
    *decoder_layers, last = text.layers
    packs = [_Pack(model, batch, stream.device, fused, wait_on_device) for batch in batches]

    with_images = [pack for pack in packs if pack.pixels is not None]
    if with_images:
        for pack in with_images:
            pack.begin_patches()
        blocks = list(vision_tower(model).blocks)
        for index, _ in enumerate(stream.through(blocks, then=text.layers[0])):
            for pack in with_images:
                pack.run_block(index)

    for pack in packs:
        pack.begin_tokens()
    for layer in stream.through(decoder_layers, then=last):
        for pack in packs:
            pack.run_layer(layer)

    results = []
    for layer in stream.through([last]):
        for pack in packs:  # no variable here: it would hold its tensor while the next pack runs
            results.append(head(pack.final_hidden(layer), pack.batch))
    return results


class _State:
    """A hidden state that waits between two layers."""

    def __init__(self, device: torch.device, waits_on_device: bool):
        self.device, self.waits_on_device = device, waits_on_device
        self.waiting: Tensor | None = None

    def put(self, hidden: Tensor) -> None:
        """Take a hidden state; in host memory it is in the same page-locked buffer each time."""
        if self.waits_on_device:
            self.waiting = hidden
            return
        if self.waiting is None or self.waiting.shape != hidden.shape:
            self.waiting = torch.empty_like(hidden, device="cpu", pin_memory=hidden.is_cuda)
        self.waiting.copy_(hidden, non_blocking=True)

    def take(self) -> Tensor:
        """Give the state away, on the device."""
        if not self.waits_on_device:
            return self.waiting.to(self.device, non_blocking=True)
        hidden, self.waiting = self.waiting, None
        return hidden


class _Pack:
    """A pack on its way through the layers."""

    def __init__(
        self,
        model: nn.Module,
        batch: PackedBatch,
        device: torch.device,
        fused: bool,
        wait_on_device: bool,
    ):
        self.model, self.fused = model, fused
        self.text, self.tower = text_model(model), vision_tower(model)
        self.pixels = batch.pixel_values
        self.batch = replace(batch, pixel_values=None, row_data={}).to(device)
        self.new_state = partial(_State, device, wait_on_device)
        self.state = self.new_state()
        self.deepstack: list[_State] = []
        self.calls: list[BlockCall] = []

    def begin_patches(self) -> None:
        """Embed the image patches, and note what the blocks of the vision tower are told."""
        pixels = self.pixels.to(self.state.device, non_blocking=True)
        grid = self.batch.image_grid_thw
        patches, self.calls = begin_patches(self.tower, pixels, grid)
        self.state.put(patches)

    def run_block(self, index: int) -> None:
        """Run a block of the vision tower."""
        call = self.calls[index]
        layer = vision_layer(call, self.fused)
        hidden = summed(layer(self.state.take(), None))
        if call.merger is not None:
            self.deepstack.append(self.new_state())
            self.deepstack[-1].put(call.merger(hidden))
        self.state.put(hidden)

    def begin_tokens(self) -> None:
        """Embed the tokens, with the features of the images that have been through the tower."""
        ids = self.batch.input_ids
        hidden = self.text.embed_tokens(ids)
        if self.calls:
            grid = self.batch.image_grid_thw
            features = merge_patches(self.tower, self.state.take(), grid)
            hidden = place_features(self.model, ids, hidden, features)
            if self.deepstack:
                self.rows = image_rows(self.model, ids, len(features))
            self.calls = []
        self.angles = text_angles(self.text, hidden, self.batch.position_ids)
        self.state.put(hidden)

    def run_layer(self, layer: nn.Module) -> None:
        """Run a text layer."""
        self.state.put(summed(self._computed(layer)))

    def final_hidden(self, layer: nn.Module) -> Tensor:
        """Run the last text layer: the final hidden states (N, D) of the rows with loss."""
        hidden = final_hidden(self.text, self._computed(layer), self.fused)
        return hidden.index_select(0, self.batch.loss_rows)

    def _computed(self, layer: nn.Module) -> Carry:
        compute = text_layer(layer, self.angles, self.batch.segments, self.fused)
        carry = compute(self.state.take(), None)
        if self.deepstack:
            carry = add_deepstack(carry, self.rows, self.deepstack.pop(0).take())
        return carry
