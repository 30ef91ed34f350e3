"""Bytes of the rollout (rollout/engine.py): the prompts' images, the prompts, and decoding."""

from dataclasses import dataclass

from ..rollout.cache import Layout, token_bytes
from ..rollout.engine import MOST_SAMPLES
from ..rollout.sampling import Sampling
from .memory_use import MemoryUse, added
from .passes import deepstack_bytes, encode_images, pack_bytes, pixel_bytes
from .planned_run import PlannedRun
from .workload import Workload, patches_of

LOGITS_COPIES = {"cpu": 3, "cuda": 0}
"""Copies of the logits in fp32 while tokens are drawn without filters, by device: scaled logits,
probabilities and their sums. CUDA's kernel makes none."""
FILTERED_COPIES = {"cpu": 6, "cuda": 9}
"""The same with filters such as top_p: sorted probabilities, and their order in 64 bits, which
CUDA's sort holds twice."""


def rollout(run: PlannedRun, work: Workload, cache_tokens: int | None = None) -> list[MemoryUse]:
    """Bytes while weights are gathered, images encoded, prompts encoded, first tokens drawn, and in
    decoding.

    The KV cache has `cache_tokens` tokens at most; by default as many as all samples need.
    """
    model, layout = run.policy, cache_layout(work, cache_tokens)
    decoding = _decoding(run, layout.sample_spans)
    prefill = _prefill(run, work, layout.prompt_spans)
    if run.device == "cuda":  # captured graphs keep their memory meanwhile
        prefill = [added(use, decoding) for use in prefill]
    whole = {"exchange": run.sharded.whole_beside_parts(model)}
    cache = whole | {"KV cache": layout.tokens * token_bytes(model.text)}
    gathering = added(whole, {"exchange": run.sharded.last_gathered(model), "KV cache": 0})
    return [gathering, *(cache | use for use in (*prefill, decoding))]


@dataclass(frozen=True)
class Samples:
    """How many of a rollout's samples are decoded at once."""

    at_once: int
    wanted: int
    """As many as would be with room for all."""
    longest: int
    """Most tokens of a sample."""

    @classmethod
    def of(cls, work: Workload, cache_tokens: int) -> "Samples":
        """The samples of `work` with a KV cache of so many tokens."""
        at_once, wanted = (
            cache_layout(work, tokens).sample_spans for tokens in (cache_tokens, None)
        )
        return cls(at_once, wanted, max(work.completions))

    @property
    def wait(self) -> bool:
        """Whether some wait for room in the KV cache."""
        return self.at_once < self.wanted

    def __str__(self) -> str:
        return (
            f"the KV cache has room for {self.at_once} of {self.wanted} samples of "
            f"{self.longest:,} tokens at once; the others wait"
        )


def cache_layout(work: Workload, cache_tokens: int | None) -> Layout:
    """How the engine lays out its KV cache for the work's samples in `cache_tokens` tokens."""
    longest = max(work.completions)
    return Layout.fitting(work.prompts, work.group, longest, MOST_SAMPLES, cache_tokens)


def cache_tokens_for(run: PlannedRun, work: Workload, available: float | None) -> int:
    """Tokens of the KV cache with which the work's samples are drawn.

    As many as all samples need, or as fit into `available` bytes beside the rollout's other
    memory; but no fewer than one prompt needs with one of its samples.
    """
    needed = cache_layout(work, None).tokens
    if available is None:
        return needed
    least = cache_layout(work.first_sample(), None).tokens
    uses = rollout(run, work, needed)
    others = max(sum(use.values()) - use["KV cache"] for use in uses if use["KV cache"])
    left = available - others
    return int(min(needed, max(least, left / token_bytes(run.policy.text))))


def _prefill(run: PlannedRun, work: Workload, most_prompts: int) -> list[MemoryUse]:
    """Bytes while the first pack of at most `most_prompts` prompts is encoded; no KV cache."""
    model = run.policy
    batch = work.prompt_pack(most_prompts, run.config.tokens_per_microbatch)
    prompts, images = len(batch.targets), patches_of(batch)
    embeddings = model.hidden_bytes(batch.input_ids.numel())
    inputs = pack_bytes(run, batch)
    if run.device == "cpu":
        inputs += pixel_bytes(model, int(images.sum()))
    first_samples = min(prompts * work.group, MOST_SAMPLES)
    logits = prompts * model.vocabulary * model.itemsize
    decoder = model.decoder(batch.segments).infer
    return [
        *encode_images(model, images, embeddings, copies_pixels=True),
        {"activations": inputs + embeddings + decoder + deepstack_bytes(model, images)},
        {"activations": embeddings, "loss head": logits + _drawing(run, first_samples)},
    ]


def _decoding(run: PlannedRun, samples: int) -> MemoryUse:
    """Bytes of one decoding step of so many samples at once; no KV cache."""
    model = run.policy
    # Of a row: residual, its norm, and what attention and MLP add (4 · D); queries and what they
    # have found (2 · heads · head_dim); gate, up and their product (3 · the MLP's width).
    between = model.text.config.intermediate_size
    numbers = 4 * model.width + 2 * model.query_width + 3 * between
    return {
        "activations": samples * numbers * model.itemsize,
        "loss head": _drawing(run, samples),
    }


def _drawing(run: PlannedRun, rows: int) -> int:
    """Bytes of the logits of so many rows, and of their copies while tokens are drawn from them."""
    logits = rows * run.policy.vocabulary
    has_filters = Sampling.of(run.config).filters
    copies = (FILTERED_COPIES if has_filters else LOGITS_COPIES)[run.device]
    return logits * run.policy.itemsize + 4 * logits * copies
