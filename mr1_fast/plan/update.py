"""Bytes of the update (optim.py): forward and backward of each pack, and the optimizer's step."""

from dataclasses import dataclass, replace

from torch import Tensor

from ..optim import resolve_optimizer
from ..types import PackedBatch
from .layers import STORED, LayerBytes, LayerStack
from .memory_use import MemoryUse, added
from .meta_model import MetaModel, Recomputed
from .passes import HeadBytes, encode_images, loss_head, pack_bytes
from .planned_run import PlannedRun
from .sharded import Sharded, groups_of
from .vision import Deepstack, VisionBytes
from .workload import patches_of


@dataclass(frozen=True)
class PackUpdate:
    """Forward and backward over one pack: what its parts allocate, and what exists when."""

    model: MetaModel
    sharded: Sharded
    """What this process holds of the model; the parts below keep as much of their gradients."""
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
        sharded, vision = run.sharded, None
        decoder = model.decoder(batch.segments, run.training)
        if len(images):
            vision = model.vision_tower(images, run.training)
            blocks = sharded.of_pack(vision.blocks, model.vision.blocks[0], is_first)
            vision = replace(vision, blocks=blocks)
        return cls(
            model=model,
            sharded=sharded,
            is_first=is_first,
            images=images,
            vision=vision,
            decoder=sharded.of_pack(decoder, model.text.layers[0], is_first),
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
            *self._root_sums(),
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
        return {
            "activations": self.inputs + activations,
            "gradients": self._gradients(made) + embedding_gradient,
            "loss head": loss_head,
            "exchange": self.sharded.pass_weights(self.model),
        }

    def _gradients(self, made: int) -> int:
        """Bytes of gradients when this pack has made so many."""
        if self.is_first:
            return made
        sums = self.sharded.gradients(self.model)
        # One process adds each gradient to its sum at once. Under `full` those of the root's group
        # stay beside the sums of their rows until the pass ends.
        return sums + made if self.sharded.kind == "full" else sums

    @property
    def _all_made(self) -> int:
        """Bytes of the gradients that this pack makes, and that are there when it ends."""
        model, decoder = self.model, self.decoder
        if self.sharded.kind != "full":
            return model.gradients
        layers = decoder.depth * decoder.stored.gradients
        if self.vision is not None and model.trains_vision:
            layers += self.vision.blocks.depth * self.vision.blocks.stored.gradients
        return layers + groups_of(self.sharded, model).root.gradients

    def _root_sums(self) -> list[MemoryUse]:
        """Bytes when the root's gradients are summed, at the very end of a pass under `full`."""
        if self.sharded.kind != "full":
            return []
        use = self._use(0, self._all_made)
        root = groups_of(self.sharded, self.model).root
        return [use | {"exchange": self.sharded.sums(root)}]

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
            others = self._all_made - model.head_bytes
            uses.append(self._use(x, others, self._waiting, embedding_gradient=model.head_bytes))
        sums = {"exchange": self.sharded.pass_sums(model)}
        return [added(use, sums) for use in uses]


def optimizer_step(run: PlannedRun) -> list[MemoryUse]:
    """Bytes of all gradients, while they are summed, and with what torch's AdamW computes.

    On CUDA it makes a denominator for every weight at once, on a CPU two tensors for one parameter
    at a time. The other optimizers compute in place.
    """
    temporary, parameters, sharded = 0, run.policy.trained, run.sharded
    if resolve_optimizer(run.config.optimizer, parameters) == "adamw":
        sizes = [sharded.updated(p) * p.itemsize for p in parameters]
        temporary = sum(sizes) if run.device == "cuda" else 2 * max(sizes)
    gradients = {"gradients": sharded.gradients(run.policy)}
    return [
        gradients | {"exchange": sharded.summed_buckets(run.policy)},
        gradients | {"activations": temporary},
    ]
