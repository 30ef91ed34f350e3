"""Bytes of a pass without gradients before the update (model/reference.py)."""

from ..model.reference import layers
from ..types import PackedBatch
from .layers import nbytes
from .memory_use import MemoryUse
from .passes import encode_images, loss_head, pack_bytes
from .planned_run import PlannedRun
from .workload import patches_of


def has_pass_before_update(run: PlannedRun) -> bool:
    """Whether the step computes log-probabilities before its update: the reference's, or its own.

    The policy's own are needed where the weights of the loss correct for the rollout's.
    """
    return run.config.needs_reference or bool(run.config.importance_cap)


def reference_pass(run: PlannedRun, batch: PackedBatch) -> list[MemoryUse]:
    """Bytes while log-probabilities of one pack are computed: images, layers and norm, LM head.

    The pass is the reference's. The policy's own takes no more.
    """
    model, tokens, rows = run.reference, batch.input_ids.numel(), len(batch.targets)
    # The decoder comes before all else that looks at the segments: on a CPU, attention makes row
    # indices of them at first use, which are part of what the pass allocates.
    decoder = model.decoder(batch.segments)
    norm = model.final_norm(tokens, len(batch.loss_rows))
    embeddings, inputs = model.hidden_bytes(tokens), pack_bytes(run, batch)
    uses = [
        *encode_images(model, patches_of(batch), embeddings, run.device == "cuda"),
        {"activations": inputs + 2 * embeddings + max(decoder.infer, norm.infer)},
        {
            "activations": inputs + model.hidden_bytes(rows),
            "loss head": loss_head(run, rows, trains=False).most,
        },
    ]
    streamed = {"reference": streamed_reference(run)}
    return [streamed | use for use in uses]


def streamed_reference(run: PlannedRun) -> int:
    """Bytes that a reference in host memory has on the device during its pass.

    `LayerStream` of model/reference.py has two slots for each kind of layer, and all that is not
    in a layer. On a CPU only the slots are copies.
    """
    config = run.config
    if not config.needs_reference or config.lora or config.reference != "offload":
        return 0
    model = run.policy.model
    by_shapes = {}
    for layer in layers(model):
        shapes = tuple(p.shape for p in layer.parameters())
        by_shapes.setdefault(shapes, []).append(layer)
    slots = sum(nbytes(layer) for equal in by_shapes.values() for layer in equal[:2])
    if run.device != "cuda":
        return slots
    return slots + run.policy.weights - sum(map(nbytes, layers(model)))
