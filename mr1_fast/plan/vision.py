"""Bytes that a vision tower allocates on the images of one pack."""

from collections.abc import Iterator
from dataclasses import dataclass

from .layers import LayerBytes, LayerStack


@dataclass(frozen=True)
class Deepstack:
    """The mergers of deepstack features, which follow some blocks of the tower."""

    after: tuple[int, ...]
    """The numbers of these blocks, counted from 1; none for most towers."""
    merger: LayerBytes
    feature: int
    """Bytes of a feature, and of its gradient."""
    shared: int
    """Bytes of a merger's input, which the next block keeps as well."""

    @classmethod
    def none(cls) -> "Deepstack":
        """A tower without such mergers, or no tower that is trained."""
        return cls((), LayerBytes(0, 0), 0, 0)

    @property
    def features(self) -> int:
        """Bytes of all features."""
        return len(self.after) * self.feature

    def waiting(self, layer: int) -> int:
        """Bytes of the features that are still to be added when text layer `layer` has begun.

        Their gradients are as many, when the backward pass has come to this layer. It is counted
        from 1; the first feature is added after the first layer.
        """
        return max(0, len(self.after) - layer + 1) * self.feature

    def saved(self, recomputed: int, blocks: int) -> int:
        """Bytes that the mergers after the first `blocks` keep, beside what the blocks keep.

        A merger is run again with its block, where the first `recomputed` are.
        """
        stored = sum(recomputed < number <= blocks for number in self.after)
        return stored * max(0, self.merger.saved - self.shared)

    def backward(self, blocks: int) -> tuple[int, int]:
        """Bytes that still wait, and that have been made, when the first `blocks` are left.

        Gradients of features wait to be used; those of the mergers' weights have been made.
        """
        left = sum(number <= blocks for number in self.after)
        return left * self.feature, (len(self.after) - left) * self.merger.gradients


@dataclass(frozen=True)
class VisionBytes:
    """Bytes that the parts of the vision tower allocate on the images of one pack."""

    embedding: LayerBytes
    """The patch embedding, with the position embedding if there is one."""
    blocks: LayerStack
    """The transformer blocks."""
    merger: LayerBytes
    """The projection of several patches to one token."""
    deepstack: Deepstack
    """The same for features of blocks in the tower's middle."""
    hidden: int
    """Bytes of the hidden states of all patches."""

    def saved(self, recomputed: int) -> int:
        """Bytes that the forward pass keeps, with the first blocks run again."""
        return self._before_merger(recomputed) + self.merger.saved

    def _before_merger(self, recomputed: int) -> int:
        blocks = self.blocks
        mergers = self.deepstack.saved(recomputed, blocks.depth)
        return self.embedding.saved + blocks.saved(recomputed) + mergers

    def backward(self, recomputed: int) -> Iterator[tuple[int, int]]:
        """The possible peaks of the backward pass, from the merger to the embedding.

        Yields the bytes of what is kept and allocated, with the gradients of deepstack features,
        and those of the gradients of weights that have been made.
        """
        blocks, deepstack = self.blocks, self.deepstack
        yield self._before_merger(recomputed) + self.merger.extra + deepstack.features, 0

        below = self.embedding.saved + self.hidden  # and the incoming gradient
        made = self.merger.gradients
        for block, kept, done in blocks.backward(recomputed, others=deepstack.after):
            kept += deepstack.saved(recomputed, block - 1)
            waiting, by_mergers = deepstack.backward(block - 1)
            yield below + kept + waiting, made + done + by_mergers
        for block in deepstack.after:
            kept = blocks.saved(recomputed, block) + deepstack.saved(recomputed, block - 1)
            waiting, by_mergers = deepstack.backward(block)
            done = (blocks.depth - block) * blocks.stored.gradients
            yield below + kept + deepstack.merger.extra + waiting, made + done + by_mergers
        done = blocks.depth * blocks.stored.gradients
        by_mergers = len(deepstack.after) * deepstack.merger.gradients
        yield self.embedding.extra + self.hidden, made + done + by_mergers
