"""Bytes of a pass without gradients before the update (model/reference.py)."""

from ..model.layer_stream import streamed_bytes
from ..model.layerwise import state_bytes, states_wait_on_device
from ..model.reference import frozen_parameters
from ..types import PackedBatch
from .memory_use import MemoryUse, added
from .passes import deepstack_bytes, encode_images, loss_head, pack_bytes, pixel_bytes, token_bytes
from .planned_run import PlannedRun
from .workload import patches_of


def has_pass_before_update(run: PlannedRun) -> bool:
    """Whether the step computes log-probabilities before its update, by the reference or policy."""
    return run.config.needs_reference or run.config.needs_own_logprobs


def reference_pass(
    run: PlannedRun, step: list[PackedBatch], packs: list[PackedBatch]
) -> list[MemoryUse]:
    """Bytes at the possible peaks while log-probabilities are computed.

    `step` are the packs of the largest step, `packs` those that may need the most by themselves.
    The pass is the reference's. The policy's own takes no more.
    """
    if is_streamed(run):
        return _by_layers(run, step, packs)
    return [use for batch in packs for use in _by_packs(run, batch)]


def _by_packs(run: PlannedRun, batch: PackedBatch) -> list[MemoryUse]:
    """Bytes while one pack is computed: images, layers and norm, LM head."""
    model, tokens, rows = run.reference, batch.input_ids.numel(), len(batch.targets)
    # The decoder comes before all else that looks at the segments: on a CPU, attention makes row
    # indices of them at first use, which are part of what the pass allocates.
    decoder = model.decoder(batch.segments)
    norm = model.final_norm(tokens, len(batch.loss_rows))
    embeddings, inputs = model.hidden_bytes(tokens), pack_bytes(run, batch)
    features = deepstack_bytes(model, patches_of(batch))
    uses = [
        *encode_images(model, patches_of(batch), embeddings, run.device == "cuda"),
        {"activations": inputs + embeddings + max(decoder.infer + features, norm.infer)},
        {
            "activations": inputs + model.hidden_bytes(rows),
            "loss head": loss_head(run, rows, trains=False).most,
        },
    ]
    gathered = {"exchange": run.sharded_reference.pass_weights(model)}
    return [added(gathered, use) for use in uses]


# --- layer by layer, over all packs ---------------------------------------------------------------


def is_streamed(run: PlannedRun) -> bool:
    """Whether there is a reference in host memory, whose layers come to the device in turn."""
    config = run.config
    return config.needs_reference and not config.lora and config.reference == "offload"


def streamed_reference(run: PlannedRun) -> int:
    """Bytes that a reference in host memory has on the device during its pass.

    On a CPU only the slots of its layers are copies.
    """
    if not is_streamed(run):
        return 0
    model = run.policy.model
    slots, others = streamed_bytes(model, frozen_parameters(model))
    return slots + others if run.device == "cuda" else slots


def _by_layers(
    run: PlannedRun, step: list[PackedBatch], packs: list[PackedBatch]
) -> list[MemoryUse]:
    """Bytes while one pack is in a layer and the others wait (model/layerwise.py)."""
    model, policy = run.reference, run.policy
    # The layers come before all else that looks at the segments, as above.
    inside = [_most_inside_layers(run, batch) for batch in packs]
    told = sum(_told_bytes(run, batch) for batch in step)

    streamed = sum(streamed_bytes(policy.model, frozen_parameters(policy.model)))
    on_device = states_wait_on_device(policy.model, step, streamed, policy.gradients)
    # In a CPU's own memory states wait either way, in buffers if not as they are.
    all_wait = on_device or run.device == "cpu"
    waiting = sum(state_bytes(policy.model, batch) for batch in step) if all_wait else 0

    reference, uses = streamed_reference(run), []
    for batch, most in zip(packs, inside, strict=True):
        rows = len(batch.targets)
        states = waiting or state_bytes(policy.model, batch)
        always = {"reference": reference, "activations": told + states}
        head = {
            "activations": model.hidden_bytes(rows),
            "loss head": loss_head(run, rows, trains=False).most,
        }
        uses += [added(always, {"activations": most}), added(always, head)]
    return uses


def _most_inside_layers(run: PlannedRun, batch: PackedBatch) -> int:
    """Most bytes at once that a pack allocates within a layer, or at an end of the model."""
    model, images = run.reference, patches_of(batch)
    decoder = model.decoder(batch.segments)
    norm = model.final_norm(batch.input_ids.numel(), len(batch.loss_rows))
    most = [decoder.alone, norm.infer]
    if len(images):
        tower = model.vision_tower(images)
        pixels = pixel_bytes(model, int(images.sum())) if run.device == "cuda" else 0
        most += [pixels + tower.embedding.infer, tower.blocks.alone, tower.merger.alone]
        most.append(tower.hidden + tower.deepstack.merger.alone)
    return max(most)


def _told_bytes(run: PlannedRun, batch: PackedBatch) -> int:
    """Bytes of what layers are told of a pack, which is on the device throughout."""
    patches = int(patches_of(batch).sum())
    return max(token_bytes(run, batch), run.policy.angle_bytes(patches))
