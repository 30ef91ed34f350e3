"""How large packs are and how many layers are run again, where the settings say `auto`.

What is chosen fits into memory and takes the least time by a simple count. Its unit is one token's
forward pass through the text layers; images count by their share of the multiplications:

    step = Σ over packs: PACK_WORK + (3 + share of layers that are run again) · work of its tokens

A backward pass is two forward passes, and running everything again is one more. PACK_WORK is what
each pack costs whatever its size: launching its kernels, and adding its gradients to those of the
packs before it. Where memory is short, keeping results in small packs is worth more than large
packs are; where it is not, larger packs are better, up to MOST_USEFUL.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import TrainConfig
from ..model.forward import LayerRun
from ..types import PackedBatch
from .meta_model import MetaModel, Recomputed
from .update import PackUpdate
from .workload import patches_of

MARGIN = 0.05
"""Share of the usable memory that `auto`, and a KV cache in which samples wait, leave free. Tests
hold a plan to 5% of what steps allocate; what is left of that is for the holes between the blocks
of CUDA's allocator."""
PACK_WORK = 1500
"""Work of a pack beside that of its tokens, in tokens. To write bf16 gradients and add them to
their sum moves 8 bytes for each weight: as long as 600 tokens take where a GPU computes 150 FLOP in
the time of one byte. The rest is for the launches that it waits for, some of the 2,500 of a 2B."""
MOST_USEFUL = 16_384
"""Tokens of a pack beyond which matrix products gain nothing, and PACK_WORK is about 3%."""
UNPLANNED = 4096
"""Tokens of a pack on a CPU, which has no limit to plan for, and where no plan can be made."""


@dataclass(frozen=True)
class Choice:
    """What a run does where its settings leave a choice."""

    tokens: int
    """Most tokens in a pack."""
    recomputed: Recomputed
    layers: Recomputed
    """How many layers there are that could be run again."""

    @classmethod
    def without_plan(cls, config: TrainConfig, layers: Recomputed, is_cuda: bool) -> "Choice":
        """The careful choice where memory cannot be planned."""
        [[tokens]] = pack_sizes(config, "cpu")
        stored = config.recompute == "none" or (config.recompute == "auto" and not is_cuda)
        return cls(tokens, Recomputed(0, 0) if stored else layers, layers)

    def apply(self, run: LayerRun) -> None:
        """Make the layers of a model run as chosen."""
        run.recompute_text, run.recompute_vision = self.recomputed.text, self.recomputed.vision

    def __str__(self) -> str:
        parts = [f"{self.recomputed.text} of {self.layers.text} text layers"]
        if self.layers.vision:
            parts.append(f"{self.recomputed.vision} of {self.layers.vision} vision blocks")
        return f"recomputed: {', '.join(parts)}; packs of {self.tokens:,} tokens"


def pack_sizes(config: TrainConfig, device: str) -> Iterator[list[int]]:
    """Sizes of packs to choose from, in tokens; later lists are for where no earlier size fits.

    A pack has the number of tokens that is set. For `auto` it has whole groups, or, where not even
    one fits into memory, parts of a group, and at least one prompt with its completion.
    """
    if config.tokens_per_microbatch != "auto":
        yield [config.tokens_per_microbatch]
        return
    longest = config.max_prompt_tokens + config.max_new_tokens
    if device == "cpu":
        yield [max(UNPLANNED, longest)]
        return

    generations = 1 if config.algo == "sft" else config.num_generations
    group = config.max_prompt_tokens + generations * config.max_new_tokens
    count = max(1, min(config.prompts_per_step, MOST_USEFUL // group))
    sizes = []
    while count:
        sizes.append(count * group)
        count //= 2
    yield sizes
    # Two parts of a group, three, and so on: each has the prompt, and completions in equal numbers.
    together = {-(-generations // parts) for parts in range(2, generations + 1)}
    for completions in sorted(together, reverse=True):
        yield [config.max_prompt_tokens + completions * config.max_new_tokens]


def choose_recomputed(
    config: TrainConfig, model: MetaModel, packs: list[PackUpdate], room: float | None
) -> Recomputed:
    """Which layers are run again, so that activations and gradients fit into `room` bytes.

    The text layers are the first to keep their results, and what is left then is for the vision
    blocks. A byte saves about as much work in both (2 and 2.2 kFLOP in a 2B), but packs of short
    completions have many images, and there must be room for the results of all of them. `room` None
    is no limit.
    """
    layers = model.layers
    if config.recompute == "all":
        return layers
    if config.recompute == "none" or room is None:
        return Recomputed(0, 0)

    def fits(text: int, vision: int) -> bool:
        recomputed = Recomputed(text, vision)
        return all(sum(use.values()) <= room for pack in packs for use in pack.uses(recomputed))

    text = next((n for n in range(layers.text) if fits(n, layers.vision)), layers.text)
    vision = next((n for n in range(layers.vision) if fits(text, n)), layers.vision)
    return Recomputed(text, vision)


def work(model: MetaModel, packs: list[PackedBatch], recomputed: Recomputed) -> float:
    """The update's work on the packs of a step, in forward passes of one token."""
    total = 0.0
    for batch in packs:
        tokens, patches = batch.input_ids.numel(), int(patches_of(batch).sum())
        images = patches * model.patch_work
        total += PACK_WORK + 3 * (tokens + images)
        total += tokens * recomputed.text / model.layers.text
        if model.layers.vision:
            total += images * recomputed.vision / model.layers.vision
    return total
