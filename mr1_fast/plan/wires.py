"""Bytes that each card sends in a step, by formula; it receives as many.

On a ring of N cards, gathering or reduce-scattering x bytes sends x·(N − 1)/N, and summing them
everywhere is both, one after the other. P are trained elements, W bytes of weights:

- none: 2·4·P·(N − 1)/N for each update, as gradients are summed in fp32;
- optimizer: (4·P + bytes of the trained weights)·(N − 1)/N for each update: sums go to who updates
  them, and new weights come back;
- full: each pack of an update gathers all W in its forward pass, and layers once more for its
  backward pass; it reduce-scatters 4·P. A pass without gradients gathers the layers for each pack,
  and the root's group once for all. The rollout gathers W once.

Parts are filled up to equal sizes. What stays whole under `full`, such as adapters, is summed as
under `none`. Completions, rewards and metrics are some hundred KiB, and not counted. Over gloo some
versions of torch have no reduce-scatter, and `optimizer` sums everywhere, which sends 8·P.
"""

from dataclasses import dataclass

from .meta_model import MetaModel
from .planned_run import PlannedRun
from .reference import is_streamed
from .sharded import Sharded, groups_of


@dataclass(frozen=True)
class Wires:
    """Bytes that a card sends in a step, by stage."""

    rollout: int = 0
    reference: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        """Bytes of the whole step."""
        return self.rollout + self.reference + self.update


def step_wires(run: PlannedRun, packs: int) -> Wires:
    """Return what a card sends in a step whose update and reference have so many packs each."""
    sharded, policy, config = run.sharded, run.policy, run.config
    if sharded.processes == 1:
        return Wires()
    own = _sent(sharded, update_bytes(sharded, policy, packs)) * config.updates_per_batch
    if sharded.kind != "full":
        return Wires(update=own)
    if config.algo == "sft":
        return Wires(update=own)
    reference = 0
    if config.needs_reference and not is_streamed(run):
        reference += pass_bytes(run.sharded_reference, run.reference, packs)
    if config.needs_own_logprobs:
        reference += pass_bytes(sharded, policy, packs)
    rollout = sharded.whole_weights(policy)
    return Wires(_sent(sharded, rollout), _sent(sharded, reference), own)


def pass_bytes(sharded: Sharded, model: MetaModel, packs: int) -> int:
    """Return the bytes that a pass without gradients over so many packs gathers."""
    groups = groups_of(sharded, model)
    return groups.root.whole + packs * sum(each.whole for each in groups.layers)


def update_bytes(sharded: Sharded, model: MetaModel, packs: int) -> int:
    """Return the bytes that one update gathers and reduce-scatters, each counted once."""
    whole = [p for p in model.trained if not sharded.splits(p)]
    if sharded.kind == "optimizer":
        return sharded.processes * sum((4 + p.itemsize) * sharded.piece(p) for p in whole)

    groups = groups_of(sharded, model)
    again = groups.decoder + (groups.blocks if model.trains_vision else [])
    gathered = sharded.whole_weights(model) + sum(each.whole for each in again)
    reduced = 4 * sum(each.trained for each in groups.all)
    return 2 * 4 * sum(p.numel() for p in whole) + packs * (gathered + reduced)


def _sent(sharded: Sharded, size: int) -> int:
    """Return what each of N cards sends when `size` bytes are gathered or reduce-scattered."""
    return size * (sharded.processes - 1) // sharded.processes
