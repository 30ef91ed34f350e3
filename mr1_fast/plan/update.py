"""Bytes of the update (optim.py): forward and backward of each pack, and the optimizer's step."""

from dataclasses import dataclass

from torch import Tensor

from ..optim import resolve_optimizer
from ..types import PackedBatch
from .layers import STORED, LayerBytes, LayerStack
from .memory_use import MemoryUse
from .meta_model import MetaModel, Recomputed
from .passes import HeadBytes, encode_images, loss_head, pack_bytes
from .planned_run import PlannedRun
from .vision import Deepstack, VisionBytes
from .workload import patches_of


@dataclass(frozen=True)
class PackUpdate:
    """Forward and backward over one pack: what its parts allocate, and what exists when."""

    model: MetaModel
    is_first: bool
    """Whether no earlier pack has left its gradients."""
    images: Tensor
    """(I,) int64 patches of each image."""
    vision: VisionBytes | None
    decoder: LayerStack
    norm: LayerBytes
    head: HeadBytes
    inputs: int
    """Bytes of the pack on the device, from the beginning to the end."""
    embeddings: int
    """Bytes of the decoder's input; as many as those of its gradient."""
    rows: int
    """Bytes of the final hidden states of the rows with loss."""
    copies_pixels: bool

    @classmethod
    def of(cls, run: PlannedRun, batch: PackedBatch, is_first: bool) -> "PackUpdate":
        """The parts traced on the pack's shapes."""
        model, images, tokens = run.policy, patches_of(batch), batch.input_ids.numel()
        return cls(
            model=model,
            is_first=is_first,
            images=images,
            vision=model.vision_tower(images, run.training) if len(images) else None,
            decoder=model.decoder(batch.segments, run.training),
            norm=model.final_norm(tokens, len(batch.loss_rows), STORED),
            head=loss_head(run, len(batch.targets), True, run.config.in_one_pass),
            inputs=pack_bytes(run, batch),
            embeddings=model.hidden_bytes(tokens),
            rows=model.hidden_bytes(len(batch.loss_rows)),
            copies_pixels=run.device == "cuda",
        )

    def uses(self, recomputed: Recomputed) -> list[MemoryUse]:
        """Bytes at the possible peaks, in the order of time."""
        kept = self._kept_by_vision(recomputed) + self.decoder.saved(recomputed.text)
        return [
            *self._forward(recomputed, kept),
            # The final norm's backward, while what the head has kept still exists.
            self._use(kept + self.norm.extra, made=0, loss_head=self.head.kept),
            *self._layers_backward(recomputed),
        ]

    def _kept_by_vision(self, recomputed: Recomputed) -> int:
        """Bytes that the vision tower's forward pass keeps."""
        return 0 if self.vision is None else self.vision.saved(recomputed.vision)

    @property
    def _waiting(self) -> int:
        """Bytes of a tied head's gradient, which waits for that of the embedding to be added."""
        return self.model.head_bytes if self.model.trains_head and self.model.is_tied else 0

    def _use(
        self, activations: int, made: int, loss_head: int = 0, embedding_gradient: int = 0
    ) -> MemoryUse:
        """Bytes at one time; `made` are those of the gradients that this pack has made so far.

        Packs after the first find the gradients of those before them.
        """
        gradients = made if self.is_first else self.model.gradients
        return {
            "activations": self.inputs + activations,
            "gradients": gradients + embedding_gradient,
            "loss head": loss_head,
        }

    def _forward(self, recomputed: Recomputed, kept: int) -> list[MemoryUse]:
        """Encoding the images, and the LM head, when every layer has kept what it needs."""
        encoding = encode_images(self.model, self.images, self.embeddings, self.copies_pixels)
        by_vision = self._kept_by_vision(recomputed)
        uses = [self._use(use["activations"] - self.inputs + by_vision, made=0) for use in encoding]
        activations = kept + self.norm.saved + self.rows
        return [*uses, self._use(activations, made=0, loss_head=self.head.most)]

    def _layers_backward(self, recomputed: Recomputed) -> list[MemoryUse]:
        """Decoder, vision tower and embedding, from last to first."""
        model, decoder, x = self.model, self.decoder, self.embeddings
        by_vision = self._kept_by_vision(recomputed)
        vision = self.vision if model.trains_vision else None
        deepstack = Deepstack.none() if vision is None else vision.deepstack
        made = 0 if model.is_tied else model.head_bytes * model.trains_head
        uses = [
            self._use(by_vision + x + kept + deepstack.waiting(layer), made + done, self._waiting)
            for layer, kept, done in decoder.backward(recomputed.text)
        ]
        made += decoder.depth * decoder.stored.gradients
        if vision is not None:
            uses += [
                self._use(x + kept, made + done, self._waiting)
                for kept, done in vision.backward(recomputed.vision)
            ]
        if model.text.embed_tokens.weight.requires_grad:
            # The embedding's gradient comes last, and is as large as the head.
            others = model.gradients - model.head_bytes
            uses.append(self._use(x, others, self._waiting, embedding_gradient=model.head_bytes))
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
