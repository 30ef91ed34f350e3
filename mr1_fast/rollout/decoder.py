"""The device's part of decoding: one token for each of R running samples, as a CUDA graph where there is CUDA.

A step takes a small table of integers, which says for every row which token it goes on from and where its keys are,
and gives tokens and log-probabilities. All else is on the host (engine.py), so a graph knows nothing of prompts,
lengths or ends.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.decode.linear import linears, swiglu
from ..kernels.decode.operations import add_rms_norm, attend, silu_mul
from ..model.forward import base_model
from .cache import Pool
from .sampling import Sampling, draw

COLUMNS = (
    "token",
    "source",
    "position",
    "prefix_start",
    "prefix_len",
    "own_start",
    "own_len",
    "span",
)
"""Of a row: the token to go on from, or −1 for that of row `source` of the step before; its position in all three axes;
where its prompt's and its own tokens are in the pool, the new one counted; which span is its own (the last: none)."""
SIZES = (1, 8, 32, 64, 128, 256)
"""Rows of the captured graphs; a step takes the next larger one."""
PENDING = 3
"""Steps whose results may be on their way to the host."""


class Decoder:
    """Decodes up to `rows` samples at once with a model's current weights and a pool of keys and values."""

    ahead = 0
    """Steps that the host may launch before it has looked at the results of the one before."""

    def __init__(self, model: nn.Module, pool: Pool, sampling: Sampling, rows: int):
        base = base_model(model)
        self.text, self.head = base.model.language_model, base.lm_head
        self.pool, self.sampling = pool, sampling
        # A sampled placeholder would ask the next forward for an image feature that does not exist.
        self.banned = (base.config.image_token_id, base.config.video_token_id)
        device = self.head.weight.device
        self.previous = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seen = None
        if sampling.repetition_penalty != 1:
            shape = pool.layout.sample_spans + 1, self.head.weight.shape[0]
            self.seen = torch.zeros(shape, dtype=torch.bool, device=device)

    def launch(self, table: np.ndarray, uniform: np.ndarray):
        """Start a step for R rows: `table` (R, 8) int32 (COLUMNS), `uniform` (R,) fp32 in [0, 1).

        Returns a function that waits for (tokens, log-probabilities) as NumPy arrays (R,).
        """
        device = self.previous.device
        results = self.step(
            torch.from_numpy(table).to(device), torch.from_numpy(uniform).to(device)
        )
        return lambda: tuple(x.cpu().numpy() for x in results)

    def step(self, table: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (R,) int64 and log-probabilities (R,) fp32."""
        token, source, position = table[:, 0], table[:, 1].long(), table[:, 2]
        tokens = torch.where(token >= 0, token, self.previous[source])
        hidden = self.hidden(tokens, position, table[:, 3:7].contiguous())
        seen = None
        if self.seen is not None:
            spans = table[:, 7].long()
            self.seen.index_put_((spans, tokens.long()), torch.ones_like(spans, dtype=torch.bool))
            seen = self.seen[spans]
        tokens, logprobs = draw(self.head(hidden), uniform, self.sampling, self.banned, seen)
        self.previous[: len(tokens)] = tokens.clamp(
            min=0
        )  # after NaN: the host may be a step from seeing it
        return tokens, logprobs

    def first(
        self, hidden: Tensor, prompts: list[Tensor], uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first tokens (P·G,) of P prompts, from their last hidden states (P, D), and the log-probabilities."""
        logits = self.head(hidden)
        seen = None
        if self.seen is not None:
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row, ids in zip(seen, prompts, strict=True):
                row[ids.to(row.device)] = True
        rows = torch.arange(len(uniform), device=logits.device) // (len(uniform) // len(hidden))
        drawn = [
            draw(
                logits[some],
                values,
                self.sampling,
                self.banned,
                seen if seen is None else seen[some],
            )
            for some, values in zip(
                rows.split(SIZES[-1]), uniform.to(logits.device).split(SIZES[-1]), strict=True
            )
        ]
        return tuple(torch.cat(parts) for parts in zip(*drawn, strict=True))

    def forget(self, span: int, prompt: Tensor) -> None:
        """A new sample takes a span: seen are the tokens of its prompt alone."""
        self.seen[span] = False
        self.seen[span, prompt.to(self.seen.device)] = True

    def hidden(self, tokens: Tensor, position: Tensor, spans: Tensor) -> Tensor:
        """Final hidden states (R, D) of one new token a row, whose keys and values are added to the pool."""
        residual, update = self.text.embed_tokens(tokens), None
        cos, sin = self.angles(residual, position)
        for layer, keys, values in zip(
            self.text.layers, self.pool.keys, self.pool.values, strict=True
        ):
            attention, mlp = layer.self_attn, layer.mlp
            residual, x = normed(residual, update, layer.input_layernorm)
            projected = project(x, attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (part.view(len(x), -1, keys.shape[-1]) for part in projected)
            update = attend(q, k, v, cos, sin, keys, values, spans, attention.scaling)
            update = attention.o_proj(update.flatten(1))
            residual, x = normed(residual, update, layer.post_attention_layernorm)
            update = mlp.down_proj(gated(x, mlp.gate_proj, mlp.up_proj))
        return normed(residual, update, self.text.norm)[1]

    def angles(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (R, d) of a text position, which is the same in M-RoPE's three axes."""
        cos, sin = self.text.rotary_emb(x[None], position.expand(3, 1, -1))
        return tuple(
            part.flatten(0, -3)[0] for part in (cos, sin)
        )  # older transformers: one for each axis


def normed(residual: Tensor, update: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """residual + update, and its norm: (R, D) each."""
    return add_rms_norm(residual, update, norm.weight, norm.variance_epsilon)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each layer makes of x (R, D), in one launch where they are neither adapters nor in 4 bits."""
    if all(type(layer) is nn.Linear for layer in layers):
        weights, biases = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
        return linears(x, weights, biases)
    return tuple(layer(x) for layer in layers)


def gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """silu(gate(x)) · up(x), likewise."""
    if type(gate) is type(up) is nn.Linear and gate.bias is up.bias is None:
        return swiglu(x, gate.weight, up.weight)
    return silu_mul(gate(x), up(x))


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a work space for each stream that it has seen."""
    return torch.cuda.Stream(device)


@dataclass
class Slot:
    """Pinned memory of a step on its way, and the event that says that its results are there."""

    table: Tensor
    uniform: Tensor
    results: Tensor
    done: torch.cuda.Event


class Graphs:
    """A decoder's step captured for each of SIZES, when first needed. Weights are read where they are.

    A row without a sample (of a graph with more rows than samples) goes on from token 0 in the pool's scratch row. The
    host is a step behind, so that the device never waits for it.
    """

    ahead = 1

    def __init__(self, decoder: Decoder, rows: int):
        self.decoder, self.device = decoder, decoder.previous.device
        self.sizes = sorted({min(size, rows) for size in (*SIZES, rows)})
        self.table = torch.zeros(rows, len(COLUMNS), dtype=torch.int32, device=self.device)
        self.uniform = torch.zeros(rows, device=self.device)
        self.idle = torch.tensor(
            [0, 0, 0, 0, 0, 0, 1, decoder.pool.layout.sample_spans], dtype=torch.int32
        )
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.memory = torch.cuda.graph_pool_handle()
        self.slots = [self._slot(rows) for _ in range(PENDING)]
        self.launched = 0

    def _slot(self, rows: int) -> Slot:
        table, results = (
            torch.zeros(rows, n, dtype=torch.int32, pin_memory=True) for n in (len(COLUMNS), 2)
        )
        return Slot(table, torch.zeros(rows, pin_memory=True), results, torch.cuda.Event())

    def launch(self, table: np.ndarray, uniform: np.ndarray):
        """`Decoder.launch`."""
        count = len(table)
        size = next(size for size in self.sizes if size >= count)
        if size not in self.captured:
            self.captured[size] = self._capture(size)
        graph, results = self.captured[size]
        slot = self.slots[self.launched % PENDING]
        self.launched += 1
        slot.table[:count], slot.table[count:size] = torch.from_numpy(table), self.idle
        slot.uniform[:count] = torch.from_numpy(uniform)
        self.table[:size].copy_(slot.table[:size], non_blocking=True)
        self.uniform[:size].copy_(slot.uniform[:size], non_blocking=True)
        graph.replay()
        slot.results[:size].copy_(results, non_blocking=True)
        slot.done.record()

        def wait() -> tuple[np.ndarray, np.ndarray]:
            slot.done.synchronize()
            found = slot.results[:count].numpy()
            return found[:, 0].copy(), found[:, 1].copy().view(np.float32)

        return wait

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self.table[:size] = self.idle.to(self.device)
        stream, previous = capture_stream(self.device), self.decoder.previous.clone()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # kernels are compiled and libraries set up before a capture
            self._step(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, stream=stream):
            results = self._step(size)
        self.decoder.previous.copy_(previous)
        return graph, results

    def _step(self, size: int) -> Tensor:
        tokens, logprobs = self.decoder.step(self.table[:size], self.uniform[:size])
        return torch.stack([tokens.to(torch.int32), logprobs.view(torch.int32)], dim=1)
