"""What one of several processes holds of weights, gradients and optimizer, by kind of sharding.

docs/distributed.md has the three kinds. All bytes are those of the process that holds the most: a
tensor of n rows is cut into parts of ⌈n/N⌉ rows, of which the last processes may have less.

- none: everything is whole.
- optimizer: each process updates ⌈blocks/N⌉ of a parameter's blocks of 256 elements, and has the
  optimizer's states of these alone.
- full: FSDP2 holds rows of every matrix. A decoder layer or vision block is whole while it is
  computed, and the next one is brought together meanwhile. All other weights (embedding, LM head,
  final norm, the ends of the vision tower) are the root's group, which is whole throughout a pass.

Under `full`, too, adapters and weights in 4 bits stay whole, and so do trained parameters whose
parts would cut a block of the optimizer's states: biases and norms.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from torch import nn

from ..distributed.optimizer_shards import piece_size
from ..distributed.sharding import Sharding
from ..model.fsdp import most_elements
from ..model.layer_stream import layers
from .layers import LayerStack
from .meta_model import MetaModel

KINDS = ("none", "optimizer", "full")
"""The kinds of sharding, from the one that holds the most to the one that holds the least."""


@dataclass(frozen=True)
class Sharded:
    """How a planned run is spread over processes."""

    kind: str = "none"
    processes: int = 1
    whole_adapters: bool = False
    """Whether the trained parameters are adapters, which stay whole."""
    block: int = 1
    """Elements of the optimizer's states that a cut must not part."""

    def __str__(self) -> str:
        return f"{self.processes} processes, sharding {self.kind}"

    # --- of one parameter -------------------------------------------------------------------------

    def splits(self, p: nn.Parameter) -> bool:
        """Return whether a process holds rows of this parameter, and not all of it."""
        if self.kind != "full" or not p.is_floating_point():
            return False
        if not p.requires_grad:
            return True
        return not self.whole_adapters and most_elements(p, self.processes) % self.block == 0

    def held(self, p: nn.Parameter) -> int:
        """Return the elements of a parameter that a process holds between passes."""
        return most_elements(p, self.processes) if self.splits(p) else p.numel()

    def updated(self, p: nn.Parameter) -> int:
        """Return the elements of a parameter that a process updates and has states of."""
        return min(p.numel(), self.piece(p)) if self.kind == "optimizer" else self.held(p)

    def piece(self, p: nn.Parameter) -> int:
        """Return the elements of a process's blocks of a parameter, the last one filled up."""
        return piece_size(p.numel(), self.processes)

    # --- of a model -------------------------------------------------------------------------------

    def weights(self, model: MetaModel) -> int:
        """Return the bytes of a model's weights and buffers between passes."""
        groups = groups_of(self, model)
        return model.weights - sum(each.size - each.part for each in groups.all)

    def whole_weights(self, model: MetaModel) -> int:
        """Return the bytes of the weights that are gathered, of all processes together."""
        return sum(each.whole for each in groups_of(self, model).all)

    def whole_beside_parts(self, model: MetaModel) -> int:
        """Return the bytes that gathered weights take for a rollout, beside those of `weights`.

        The parts' own memory is given up meanwhile.
        """
        return sum(each.whole - each.part for each in groups_of(self, model).all)

    def last_gathered(self, model: MetaModel) -> int:
        """Return the bytes of the last layer as it arrives, and of the part that goes then."""
        last = groups_of(self, model).decoder[-1]
        return last.whole + last.part

    @lru_cache(maxsize=32)  # noqa: B019, since nothing of this is large
    def gradients(self, model: MetaModel) -> int:
        """Return the bytes of the gradients' sums, after all packs of a step."""
        return sum(self.held(p) * p.itemsize for p in model.trained)

    def pass_weights(self, model: MetaModel) -> int:
        """Return the bytes that are gathered during a pass: the root's, and two layers'."""
        groups = groups_of(self, model)
        return groups.root.whole + 2 * groups.largest.whole

    def pass_sums(self, model: MetaModel) -> int:
        """Return the bytes of a layer's gradients in fp32, as they are summed over processes."""
        return self.sums(groups_of(self, model).largest)

    def sums(self, group: "Group") -> int:
        """Return the bytes of a group's gradients in fp32, and of their sums' rows beside them."""
        return 4 * (group.trained + group.trained // self.processes)

    def summed_buckets(self, model: MetaModel) -> int:
        """Return the bytes through which whole gradients are summed after the last pack.

        They are put together in fp32, where everything is whole after a cast of each. Who updates
        a part gets its sum apart.
        """
        whole = [p for p in model.trained if not self.splits(p)]
        if self.processes == 1 or not whole:
            return 0
        if self.kind == "optimizer":
            elements = min(Sharding.bucket, self.processes * sum(map(self.piece, whole)))
            return 4 * (elements + elements // self.processes)
        copies = 2 if any(p.itemsize < 4 for p in whole) else 1
        return 4 * copies * min(Sharding.bucket, sum(p.numel() for p in whole))

    def of_pack(self, stack: LayerStack, module: nn.Module, is_first: bool) -> LayerStack:
        """Return equal layers, each like `module`, with what their gradients leave behind.

        Of a layer's gradients a process keeps its rows, which are added to those of the packs
        before.
        """
        if self.kind != "full":
            return stack
        trained = (p for p in module.parameters() if p.requires_grad)
        left = sum(self.held(p) * p.itemsize for p in trained) if is_first else 0
        ways = (replace(way, gradients=left) for way in (stack.stored, stack.again))
        return LayerStack(stack.depth, *ways)


ONE_CARD = Sharded()
"""A run of one process."""


@dataclass(frozen=True)
class Group:
    """Parameters that FSDP2 brings together at once; those that stay whole are not among them."""

    size: int
    """Bytes of the parameters."""
    part: int
    """Bytes of the parts that a process holds."""
    whole: int
    """Bytes of all parts as they are gathered, each as large as the largest."""
    trained: int
    """Elements of all parts that get gradients, in the same way."""
    gradients: int
    """Bytes of these gradients while they are whole."""


@dataclass(frozen=True)
class Groups:
    """The groups of a model, in the order of a forward pass."""

    root: Group
    blocks: list[Group]
    """Of the vision blocks."""
    decoder: list[Group]
    """Of the decoder layers."""

    @cached_property
    def largest(self) -> Group:
        """The largest layer."""
        return max(self.layers, key=lambda group: (group.trained, group.whole))

    @property
    def layers(self) -> list[Group]:
        """Vision blocks and decoder layers."""
        return [*self.blocks, *self.decoder]

    @property
    def all(self) -> list[Group]:
        """The root's group and all layers."""
        return [self.root, *self.layers]


@lru_cache(maxsize=32)
def groups_of(sharded: Sharded, model: MetaModel) -> Groups:
    """Return the groups that FSDP2 makes of a model; empty ones under other kinds."""

    def group(parameters: Iterable[nn.Parameter]) -> Group:
        split = [p for p in parameters if sharded.splits(p)]
        trained = [p for p in split if p.requires_grad]
        return Group(
            size=sum(p.nbytes for p in split),
            part=sum(sharded.held(p) * p.itemsize for p in split),
            whole=sharded.processes * sum(sharded.held(p) * p.itemsize for p in split),
            trained=sharded.processes * sum(map(sharded.held, trained)),
            gradients=sum(p.nbytes for p in trained),
        )

    modules = layers(model.model)
    inside = {id(p) for module in modules for p in module.parameters()}
    groups = [group(module.parameters()) for module in modules]
    depth = len(model.text.layers)
    return Groups(
        root=group(p for p in model.model.parameters() if id(p) not in inside),
        blocks=groups[:-depth],
        decoder=groups[-depth:],
    )
