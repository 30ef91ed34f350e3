"""Bytes of the update (optim.py): forward and backward of each pack, and the optimizer's step."""

from dataclasses import dataclass

from torch import Tensor

from ..optim import resolve_optimizer
from ..types import PackedBatch
from .layers import LayerBytes
from .memory_use import MemoryUse
from .meta_model import STORED, MetaModel, VisionBytes
from .passes import HeadBytes, encode_images, loss_head, pack_bytes
from .planned_run import PlannedRun
from .workload import patches_of


def update(run: PlannedRun, batch: PackedBatch, is_first: bool) -> list[MemoryUse]:
    """Bytes at the possible peaks of forward and backward over one pack, in the order of time.

    Packs after the first find the gradients of those before them.
    """
    step = _PackUpdate.of(run, batch, is_first)
    return [*step.forward(), *step.head_backward(), *step.layers_backward()]


@dataclass(frozen=True)
class _PackUpdate:
    """Forward and backward over one pack: what its parts allocate, and what exists when."""

    model: MetaModel
    is_first: bool
    """Whether no earlier pack has left its gradients."""
    images: Tensor
    """(I,) int64 patches of each image."""
    vision: VisionBytes | None
    decoder: LayerBytes
    norm: LayerBytes
    head: HeadBytes
    inputs: int
    """Bytes of the pack on the device, from the beginning to the end."""
    embeddings: int
    """Bytes of the decoder's input; as many as those of its gradient."""
    copies_pixels: bool

    @classmethod
    def of(cls, run: PlannedRun, batch: PackedBatch, is_first: bool) -> "_PackUpdate":
        """The parts traced on the pack's shapes."""
        model, images, tokens = run.policy, patches_of(batch), batch.input_ids.numel()
        inputs, embeddings = pack_bytes(run, batch), model.hidden_bytes(tokens)
        if run.config.lora and run.config.gradient_checkpointing:
            inputs += embeddings  # peft makes the embeddings require a gradient
        return cls(
            model=model,
            is_first=is_first,
            images=images,
            vision=model.vision_tower(images, run.training) if len(images) else None,
            decoder=model.decoder(batch.segments, run.training),
            norm=model.final_norm(tokens, len(batch.loss_rows), STORED),
            head=loss_head(run, len(batch.targets), trains=True),
            inputs=inputs,
            embeddings=embeddings,
            copies_pixels=run.device == "cuda",
        )

    @property
    def kept_by_vision(self) -> int:
        """Bytes that the vision tower's forward pass keeps."""
        if self.vision is None:
            return 0
        parts = (self.vision.embedding, self.vision.blocks, self.vision.merger)
        return sum(part.saved * part.depth for part in parts)

    @property
    def waiting(self) -> int:
        """Bytes of a tied head's gradient, which waits for that of the embedding to be added."""
        return self.model.head_bytes if self.model.trains_head and self.model.is_tied else 0

    def use(
        self, activations: int, made: int, loss_head: int = 0, embedding_gradient: int = 0
    ) -> MemoryUse:
        """Bytes at one time; `made` are those of the gradients that this pack has made so far."""
        gradients = made if self.is_first else self.model.gradients
        return {
            "activations": self.inputs + activations,
            "gradients": gradients + embedding_gradient,
            "loss head": loss_head,
        }

    def forward(self) -> list[MemoryUse]:
        """Encoding the images, and the LM head, when every layer has kept what it needs."""
        kept = self.kept_by_vision + self.embeddings + self.decoder.saved * self.decoder.depth
        encoding = encode_images(self.model, self.images, self.embeddings, self.copies_pixels)
        uses = [
            self.use(use["activations"] - self.inputs + self.kept_by_vision, made=0)
            for use in encoding
        ]
        return [*uses, self.use(kept + self.norm.saved, made=0, loss_head=self.head.most)]

    def head_backward(self) -> list[MemoryUse]:
        """The final norm's backward, while what the head has kept still exists."""
        kept = self.kept_by_vision + self.embeddings + self.decoder.saved * self.decoder.depth
        return [self.use(kept + self.norm.extra, made=0, loss_head=self.head.kept)]

    def layers_backward(self) -> list[MemoryUse]:
        """Decoder, vision tower and embedding, from last to first.

        From layer to layer what is stored becomes less and the gradients more, both by a constant:
        the peak is at the last layer or at the first.
        """
        model, decoder, x = self.model, self.decoder, self.embeddings
        made = 0 if model.is_tied else model.head_bytes * model.trains_head
        uses = []
        for left in (decoder.depth, 1):
            stored = self.kept_by_vision + x + (left - 1) * decoder.saved
            done = made + (decoder.depth - left) * decoder.gradients
            uses.append(self.use(stored + x + decoder.extra, done, self.waiting))
        made += decoder.depth * decoder.gradients

        if self.vision is not None and self.vision.blocks.extra:
            uses += self._vision_backward(self.vision, made)
        if model.text.embed_tokens.weight.requires_grad:
            # The embedding's gradient comes last, and is as large as the head.
            others = model.gradients - model.head_bytes
            uses.append(self.use(x, others, self.waiting, embedding_gradient=model.head_bytes))
        return uses

    def _vision_backward(self, vision: VisionBytes, made: int) -> list[MemoryUse]:
        """The merger's backward, then that of the blocks, from last to first."""
        model, x, blocks = self.model, self.embeddings, vision.blocks
        stored = self.kept_by_vision - vision.merger.saved + x
        uses = [self.use(stored + vision.merger.extra, made, self.waiting)]
        gradient = int(self.images.sum()) * model.vision_width * model.itemsize
        for left in (blocks.depth, 1):
            stored = x + vision.embedding.saved + (left - 1) * blocks.saved
            done = made + (blocks.depth - left) * blocks.gradients
            uses.append(self.use(stored + gradient + blocks.extra, done, self.waiting))
        return uses


def optimizer_step(run: PlannedRun) -> MemoryUse:
    """Bytes of all gradients, and of what torch's AdamW computes on its way.

    On CUDA it makes a denominator for every weight at once, on a CPU two tensors for one parameter
    at a time. The other optimizers compute in place.
    """
    temporary, parameters = 0, run.policy.trained
    if resolve_optimizer(run.config.optimizer, parameters) == "adamw":
        sizes = [p.nbytes for p in parameters]
        temporary = sum(sizes) if run.device == "cuda" else 2 * max(sizes)
    return {"gradients": run.policy.gradients, "activations": temporary}
