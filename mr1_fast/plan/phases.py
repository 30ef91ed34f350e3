"""Bytes on the device at every moment of a step that may be its peak: rollout, reference, update (train.py's stages).

A moment is a dict of bytes by component; a phase is its largest moment. What layers allocate is traced (memory.py);
what lives in which order is written here.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..config import TrainConfig
from ..kernels.adamw.state import State
from ..kernels.grpo.linear import CHUNK_BYTES, SLICE
from ..model.forward import base_model, lm_head_weight
from ..model.reference import in_8_bits, layers
from ..optim import resolve_optimizer
from ..rollout.cache import Layout, token_bytes
from ..rollout.engine import MOST_SAMPLES
from ..rollout.sampling import Sampling
from ..segments import Segments
from ..types import PackedBatch
from .layers import Stack, meta_model, nbytes, trace
from .workload import Workload, patches_of

Moment = dict[str, int]
CUDA_WORKSPACE = 2**30 * 6 // 10
"""CUDA's context and loaded kernels (0.3 to 0.5 GiB), and cuBLAS' work space; not tensors, so on no other device."""
COPIES = {"cpu": (3, 6), "cuda": (0, 9)}
"""fp32 copies of the logits while a token is drawn, without and with filters: scaled, probabilities, sums (none for the
kernels on CUDA); and sorted probabilities and their order in 64 bits, which CUDA's sort holds twice."""
PATCH = 3 * 2 * 14 * 14
"""Numbers of an image patch."""


@dataclass
class Step:
    """One model in training on one device; its methods give the moments of a step's phases."""

    config: TrainConfig
    model_config: PretrainedConfig
    device: str
    """`cuda` or `cpu`."""
    dtype: torch.dtype
    model: nn.Module = field(init=False)

    def __post_init__(self):
        self.model = meta_model(self.config, self.model_config, self.dtype, self.device)
        inner = base_model(self.model).model
        self.text, self.vision = inner.language_model, inner.visual
        (self.vocabulary, self.width), self.item = (
            lm_head_weight(self.model).shape,
            self.dtype.itemsize,
        )
        self.vocabulary_bytes = lm_head_weight(self.model).nbytes
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trains_head = lm_head_weight(self.model).requires_grad
        self.is_tied = lm_head_weight(self.model) is self.text.embed_tokens.weight

    # --- what is always there -------------------------------------------------------------------------------------

    def resident(self) -> Moment:
        """Weights, optimizer state and reference, between all phases."""
        always = {"weights": nbytes(self.model), **self.optimizer(), "reference": self.reference()}
        if self.device == "cuda":
            always["workspace"] = CUDA_WORKSPACE
        return always

    def optimizer(self) -> Moment:
        """State of the optimizer, and the bits that an exact bf16 weight has beyond its 16."""
        kind = resolve_optimizer(self.config.optimizer, self.trained)
        if kind == "adamw":
            return {"optimizer": 2 * sum(p.nbytes for p in self.trained)}
        if (
            kind == "adamw8bit"
        ):  # two states of a byte with an fp32 scale for 256; below 4096 elements they stay fp32
            sizes = [p.numel() for p in self.trained]
            return {
                "optimizer": sum(2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n for n in sizes)
            }
        states = [State.zeros(p, remainder=kind == "adamw_exact") for p in self.trained]
        remainder = sum(state.remainder.nbytes for state in states if state.remainder is not None)
        return {
            "optimizer": sum(t.nbytes for s in states for t in s if t is not None) - remainder,
            "remainder": remainder,
        }

    @property
    def needs_reference(self) -> bool:
        """Whether the KL term compares with a reference."""
        return self.config.algo != "sft" and self.config.kl_schedule().beta_max > 0

    def reference(self) -> int:
        """Of the frozen copy, outside of its passes."""
        if not self.needs_reference or self.config.lora:
            return 0
        if self.config.reference == "offload" and self.device == "cuda":
            return 0
        return nbytes(self.frozen())

    def frozen(self) -> nn.Module:
        """A model with the reference's weights; one in 16 bits is the policy's again as far as bytes go."""
        if self.config.lora or self.config.reference != "8bit":
            return self.model
        return copy.deepcopy(self.model, in_8_bits(self.model)).requires_grad_(False)

    def streamed(self) -> int:
        """What a reference in host memory has on the device during a pass: two slots a kind of layer, the rest."""
        if not self.needs_reference or self.config.lora or self.config.reference != "offload":
            return 0
        slots = {}
        for layer in layers(self.model):
            slots.setdefault(tuple(p.shape for p in layer.parameters()), []).append(layer)
        in_slots = sum(nbytes(layer) for same in slots.values() for layer in same[:2])
        others = nbytes(self.model) - sum(map(nbytes, layers(self.model)))
        return in_slots + (
            others if self.device == "cuda" else 0
        )  # on a CPU these are where they are

    # --- what layers allocate -------------------------------------------------------------------------------------

    def meta(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An input without data."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def trace(self, layers, x: Tensor, call, trains: bool, recompute: bool = False) -> Stack:
        """memory.trace on this device."""
        return trace(list(layers), x, call, self.device, trains, recompute)

    def vision_stacks(
        self, vision: nn.Module, images: Tensor, trains: bool
    ) -> tuple[Stack, Stack, Stack]:
        """Patch embedding, blocks and merger on images of so many patches, and the rotary angles in the first."""
        patches, block = int(images.sum()), vision.blocks[0]
        bounds = torch.cat([images.new_zeros(1), images.cumsum(0)]).to(torch.int32)
        angles = [
            self.meta(patches, self.vision_width // vision.config.num_heads, dtype=torch.float32)
        ] * 2

        def run(block, x):
            return block(
                x,
                cu_seqlens=bounds,
                max_seqlen=int(images.max()),
                position_embeddings=tuple(angles),
            )

        trains = trains and any(p.requires_grad for p in block.parameters())
        recompute = trains and self.config.gradient_checkpointing
        x = self.meta(patches, self.vision_width)
        pixels = self.meta(patches, PATCH, dtype=torch.float32)
        embedding = self.trace([vision.patch_embed], pixels, lambda module, x: module(x), trains)
        blocks = self.trace(vision.blocks, x, run, trains, recompute)
        return (
            embedding,
            self._offloaded(blocks, x),
            self.trace([vision.merger], x, lambda module, x: module(x), trains),
        )

    @property
    def vision_width(self) -> int:
        """Hidden size of the vision blocks."""
        return self.vision.patch_embed.proj.out_channels

    def decoder(self, text: nn.Module, segments: Segments, trains: bool) -> Stack:
        """Decoder layers on packed tokens."""
        x = self.meta(1, segments.num_tokens, self.width)
        angles = tuple(
            self.meta(1, x.shape[1], text.layers[0].self_attn.head_dim) for _ in range(2)
        )

        def run(layer, x):
            return layer(x, attention_mask=None, position_embeddings=angles, segments=segments)

        recompute = trains and self.config.gradient_checkpointing
        return self._offloaded(self.trace(text.layers, x, run, trains, recompute), x)

    def _offloaded(self, stack: Stack, x: Tensor) -> Stack:
        """Inputs of layers kept in host memory, as --offload-checkpoints does; on a CPU that is the same memory."""
        config = self.config
        if not (
            config.offload_checkpoints
            and config.gradient_checkpointing
            and self.device == "cuda"
            and stack.extra
        ):
            return stack
        return Stack(stack.depth, stack.infer, 0, stack.extra + x.nbytes, stack.gradients)

    def norm(self, text: nn.Module, batch: PackedBatch, trains: bool) -> Stack:
        """Final norm, and the choice of the rows that carry loss."""
        x = self.meta(batch.input_ids.numel(), self.width)
        rows = torch.empty(batch.loss_rows.shape, dtype=torch.int64, device="meta")
        return self.trace([text.norm], x, lambda module, x: module(x).index_select(0, rows), trains)

    def inputs(self, batch: PackedBatch) -> int:
        """A pack on the device, and its rotary angles and masks."""
        tokens, patches = batch.input_ids.numel(), int(patches_of(batch).sum())
        angles = 2 * tokens * self.text.layers[0].self_attn.head_dim * self.item
        angles += 2 * patches * self.vision_width // self.vision.config.num_heads * 4
        if self.device == "cuda":
            return (
                angles + 4 * PATCH * patches + 8 * (5 * tokens + 3 * len(batch.segments.key_rows))
            )
        masks = [r.visible for r in batch.segments.padded.rectangles if r.visible is not None]
        return angles + sum(mask.numel() * (1 + self.item) for mask in masks)

    # --- phases ---------------------------------------------------------------------------------------------------

    def rollout(self, work: Workload, cache_tokens: int | None = None) -> list[Moment]:
        """The prompts' images, the prompts, their samples' first tokens, and a step of decoding (rollout/engine.py).

        The pool of keys and values is as large as all samples need, or has `cache_tokens` at most.
        """
        layout = self.layout(work, cache_tokens)
        most = layout.prompt_spans
        batch, *_ = Workload(work.prompts[:most], work.patches[:most], [1] * most).packs(
            self.config.tokens_per_microbatch
        )
        count, images = len(batch.targets), patches_of(batch)
        x = batch.input_ids.numel() * self.width * self.item
        inputs = self.inputs(batch) + (4 * PATCH * int(images.sum()) if self.device == "cpu" else 0)
        layers = self.decoder(self.text, batch.segments, trains=False)
        group = len(work.completions) // len(work.prompts)
        rows = layout.sample_spans
        # Of a row: residual, normed, queries and what attention and MLP make of them; gate, up and their product.
        step = rows * (6 * self.width + 3 * self.text.config.intermediate_size) * self.item
        decode = {"activations": step, "loss head": self.drawing(rows)}
        prefill = [
            *self._images(self.vision, images, x, True),
            {"activations": inputs + 2 * x + layers.infer},
            {
                "activations": x,
                "loss head": count * self.vocabulary * self.item
                + self.drawing(min(count * group, MOST_SAMPLES)),
            },
        ]
        if (
            self.device == "cuda"
        ):  # a captured step keeps its memory while later prompts are encoded
            prefill = [
                {name: m.get(name, 0) + part for name, part in decode.items()} for m in prefill
            ]
        moments = [*prefill, decode]
        return [{"KV cache": self.cache_bytes(layout.tokens), **moment} for moment in moments]

    def layout(self, work: Workload, cache_tokens: int | None) -> Layout:
        """How the engine cuts its pool."""
        group = len(work.completions) // len(work.prompts)
        return Layout.fitting(
            work.prompts, group, max(work.completions), MOST_SAMPLES, cache_tokens
        )

    def drawing(self, rows: int) -> int:
        """Logits of rows, and what drawing from them takes."""
        logits = rows * self.vocabulary
        return (
            logits * self.item + 4 * logits * COPIES[self.device][Sampling.of(self.config).filters]
        )

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of all layers."""
        return tokens * token_bytes(self.text)

    def _images(self, vision: nn.Module, images: Tensor, others: int, copied: bool) -> list[Moment]:
        """Encoding images without gradients."""
        if not len(images):
            return []
        embedding, blocks, merger = self.vision_stacks(vision, images, trains=False)
        patches = int(images.sum())
        pixels = 4 * PATCH * patches if copied else 0
        x = patches * self.vision_width * self.item
        angles = 2 * patches * self.vision_width // vision.config.num_heads * 4
        most = max(embedding.infer, angles + x + blocks.infer, angles + x + merger.infer)
        return [{"activations": others + pixels + most}]

    def reference_pass(self, batch: PackedBatch) -> list[Moment]:
        """A pass without gradients over one pack: the reference's, or the policy's own, which takes no more."""
        model = self.frozen()
        text, vision = (
            getattr(base_model(model).model, name) for name in ("language_model", "visual")
        )
        tokens = batch.input_ids.numel() * self.width * self.item
        with model.disable_adapter() if self.config.lora else nullcontext():
            moments = self._images(vision, patches_of(batch), tokens, self.device == "cuda")
            decoder, norm = (
                self.decoder(text, batch.segments, trains=False),
                self.norm(text, batch, trains=False),
            )
        rows = len(batch.targets) * self.width * self.item
        moments.append(
            {"activations": self.inputs(batch) + 2 * tokens + max(decoder.infer, norm.infer)}
        )
        moments.append(
            {
                "activations": self.inputs(batch) + rows,
                "loss head": self.head(batch, trains=False)[0],
            }
        )
        return [{"reference": self.streamed(), **moment} for moment in moments]

    def head(self, batch: PackedBatch, trains: bool) -> tuple[int, int]:
        """(most at once, kept for the backward) of kernels/linear_grpo_loss.py on a pack's rows."""
        rows, vocabulary = len(batch.targets), self.vocabulary
        chunk = max(1, CHUNK_BYTES[self.device] // (vocabulary * self.item))
        chunk = min(chunk - chunk % 128 if chunk > 128 else chunk, max(1, rows))
        results, buffer = 4 * 8 * rows, chunk * vocabulary * self.item
        if not trains:
            return buffer + results, 0
        dhidden = rows * self.width * self.item
        if not self.trains_head:
            return dhidden + results + buffer, dhidden + results
        kept = dhidden + results + self.vocabulary_bytes
        if self.item == 4 or chunk == rows:
            return kept + buffer, kept
        slices = min(vocabulary, 2 * SLICE)  # two, as the next is made while the last is held
        casts = 4 * chunk * (slices + self.width) if self.device == "cpu" else 0
        accumulator = 2 * self.vocabulary_bytes
        return dhidden + results + accumulator + max(buffer + casts, self.vocabulary_bytes), kept

    def update(self, batch: PackedBatch, earlier: bool) -> list[Moment]:
        """Forward and backward over one pack; `earlier`: micro-batches before it have left their gradients."""
        images = patches_of(batch)
        vision = self.vision_stacks(self.vision, images, trains=True) if len(images) else ()
        decoder, norm = (
            self.decoder(self.text, batch.segments, trains=True),
            self.norm(self.text, batch, trains=True),
        )
        inputs, x = self.inputs(batch), batch.input_ids.numel() * self.width * self.item
        kept_vision = sum(stack.saved * stack.depth for stack in vision)
        if (
            self.config.lora and self.config.gradient_checkpointing
        ):  # peft makes the embeddings require a gradient
            inputs += x
        kept_text = x + decoder.saved * decoder.depth
        head, head_kept = self.head(batch, trains=True)
        gradients = nbytes(self.model, trainable=True)
        waiting = (
            self.vocabulary_bytes if self.trains_head and self.is_tied else 0
        )  # until the embedding's comes
        after_head = 0 if self.is_tied else self.vocabulary_bytes * self.trains_head

        def moment(activations: int, made: int, loss_head: int = 0, more: int = 0) -> Moment:
            return {
                "activations": inputs + activations,
                "gradients": (gradients if earlier else made) + more,
                "loss head": loss_head,
            }

        moments = self._images(self.vision, images, x, self.device == "cuda")
        moments = [moment(m["activations"] - inputs + kept_vision, 0) for m in moments]
        moments.append(moment(kept_vision + kept_text + norm.saved, 0, head))
        moments.append(moment(kept_vision + kept_text + norm.extra, 0, head_kept))
        made = after_head
        for left in (
            decoder.depth,
            1,
        ):  # stored inputs become fewer, gradients more: the most is at one of the ends
            done = (decoder.depth - left) * decoder.gradients
            activations = kept_vision + x + (left - 1) * decoder.saved + x + decoder.extra
            moments.append(moment(activations, made + done, waiting))
        made += decoder.depth * decoder.gradients
        if vision and vision[1].extra:
            embedding, blocks, merger = vision
            y = int(images.sum()) * self.vision_width * self.item
            moments.append(moment(kept_vision - merger.saved + x + merger.extra, made, waiting))
            for left in (blocks.depth, 1):
                activations = x + embedding.saved + (left - 1) * blocks.saved + y + blocks.extra
                moments.append(
                    moment(activations, made + (blocks.depth - left) * blocks.gradients, waiting)
                )
        if self.text.embed_tokens.weight.requires_grad:
            moments.append(
                moment(x, gradients - self.vocabulary_bytes, waiting, self.vocabulary_bytes)
            )
        return moments

    def optimizer_step(self) -> Moment:
        """All gradients, and what torch's AdamW computes with: on CUDA a denominator for every weight at once."""
        gradients = nbytes(self.model, trainable=True)
        temporary = 0
        if resolve_optimizer(self.config.optimizer, self.trained) == "adamw":
            sizes = [p.nbytes for p in self.trained]
            temporary = sum(sizes) if self.device == "cuda" else 2 * max(sizes)
        return {"gradients": gradients, "activations": temporary}
