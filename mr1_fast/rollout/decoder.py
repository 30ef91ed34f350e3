"""The device's part of decoding: one new token for each of R running samples.

A step takes a small table of integers, which tells for every row which token to go on from and
where its keys and values are (table.py), and gives tokens and log-probabilities. All else stays on
the host (engine.py, schedule.py): a step knows nothing of prompts, lengths or ends, so that a CUDA
graph can hold it (graphs.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.decode.operations import add_rms_norm, attend, attention_backend
from ..kernels.layers.head_norms import HeadNorms
from ..model.block_parts import Norm, head_norms
from ..model.families import banned_tokens, base_model, text_model, text_positions
from .cache import Pool
from .projection import Projection, projection
from .sampling import Sampling, draw_tokens
from .table import MOST_SAMPLES, SPAN_COLUMNS, Columns

Wait = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Waits for a step's tokens (R,) and log-probabilities (R,), and returns them."""


@dataclass
class DecoderLayer:
    """A transformer layer of the language model."""

    norm1: Norm
    qkv: Projection
    head_norms: HeadNorms | None
    """The norms of queries and keys, in families that have them."""
    scaling: float
    """What the products of queries and keys are multiplied with."""
    out: Projection
    norm2: Norm
    gate_up: Projection
    down: Projection

    @classmethod
    def of(cls, layer: nn.Module) -> DecoderLayer:
        """Read a layer's modules as they are now: their adapters may change between rollouts."""
        attention, mlp, like = layer.self_attn, layer.mlp, layer.input_layernorm.weight
        return cls(
            norm1=Norm.of(layer.input_layernorm),
            qkv=projection(like, attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms=head_norms(attention),
            scaling=attention.scaling,
            out=projection(like, attention.o_proj),
            norm2=Norm.of(layer.post_attention_layernorm),
            gate_up=projection(like, mlp.gate_proj, mlp.up_proj),
            down=projection(like, mlp.down_proj),
        )

    @property
    def projections(self) -> dict[str, Projection]:
        """The linear layers, by the names of their modules."""
        return {"q, k, v": self.qkv, "o": self.out, "gate, up": self.gate_up, "down": self.down}


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Read the layers of a model's decoder, as they are now."""
    return [DecoderLayer.of(layer) for layer in text_model(model).layers]


def describe_layers(layers: list[DecoderLayer], like: Tensor) -> str:
    """Say in one line how decoding computes the layers, on the device and in the dtype of `like`.

    An example: "attention: native · q, k, v: one product · o: …". Where layers differ, the number
    of layers is given.
    """
    found = [f"attention: {attention_backend(like)}"]
    for name in layers[0].projections if layers else ():
        ways = Counter(layer.projections[name].way for layer in layers)
        words = (way if len(ways) == 1 else f"{way} ({n} layers)" for way, n in ways.items())
        found.append(f"{name}: {', '.join(words)}")
    return " · ".join(found)


def normed(
    norm: Norm, residual: Tensor, update: Tensor | None, upcoming: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute residual + update, and its RMS norm: (R, D) each.

    update: (R, D), or parts (S, R, D) of it. upcoming: weights that are read next.
    """
    return add_rms_norm(residual, update, norm.weight, norm.eps, upcoming)


def rotary_angles(text: nn.Module, positions: int) -> tuple[Tensor, Tensor]:
    """Compute the cosine and sine (P, d) of the first P text positions, in the model's dtype.

    A text position is the same in M-RoPE's three axes, and so are its angles.
    """
    like = text.norm.weight
    position = torch.arange(positions, device=like.device).expand(3, -1)
    cos, sin = text.rotary_emb(like, text_positions(text, position))
    # Older versions of transformers give angles for each axis, (3, 1, P, d); newer (1, P, d).
    return cos.flatten(0, -3)[0], sin.flatten(0, -3)[0]


class Decoder:
    """Decodes up to `rows` samples at once, with a model's current weights and a pool."""

    ahead = 0
    """Steps that may be launched before the host has looked at the results of the step before."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[DecoderLayer],
        pool: Pool,
        sampling: Sampling,
        rows: int,
    ):
        base = base_model(model)
        self.text, self.head = text_model(base), base.lm_head
        self.layers, self.norm = layers, Norm.of(self.text.norm)
        self.pool, self.sampling = pool, sampling
        # An image takes no more positions than tokens, so no prompt ends behind its length.
        positions = pool.layout.prompt_tokens + pool.layout.sample_tokens
        self.cos, self.sin = rotary_angles(self.text, positions)
        self.banned = banned_tokens(base.config)
        device = self.head.weight.device
        self.previous = torch.zeros(rows, dtype=torch.int64, device=device)
        """(rows,) int64 tokens of the step before."""
        self.seen: Tensor | None = None
        """(spans + 1, V) bool tokens of each sample so far, where there is a repetition penalty."""
        if sampling.repetition_penalty != 1:
            shape = pool.layout.sample_spans + 1, self.head.weight.shape[0]
            self.seen = torch.zeros(shape, dtype=torch.bool, device=device)

    def launch(self, table: np.ndarray, uniform: np.ndarray) -> Wait:
        """Start a step of R rows: `table` (R, 8) int32 `Columns`; `uniform` (R,) fp32 in [0, 1)."""
        device = self.previous.device
        table, uniform = torch.from_numpy(table).to(device), torch.from_numpy(uniform).to(device)
        tokens, logprobs = self.step(table, uniform)
        return lambda: (tokens.cpu().numpy(), logprobs.cpu().numpy())

    def step(self, table: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Decode R rows of a table on the device.

        Returns tokens (R,) int64 and log-probabilities (R,) fp32.
        """
        columns = Columns(*table.unbind(1))
        known = columns.token >= 0
        tokens = torch.where(known, columns.token, self.previous[columns.source.long()])
        hidden = self.hidden(tokens, columns.position, table[:, SPAN_COLUMNS].contiguous())

        seen = None
        if self.seen is not None:
            spans = columns.span.long()
            self.seen.index_put_((spans, tokens.long()), torch.ones_like(spans, dtype=torch.bool))
            seen = self.seen[spans]

        logits = self.head(hidden)
        tokens, logprobs = draw_tokens(logits, uniform, self.sampling, self.banned, seen)
        # Token −1 stands for NaN. The host may see it a step later, and the next step needs a
        # token.
        self.previous[: len(tokens)] = tokens.clamp(min=0)
        return tokens, logprobs

    def first(
        self, hidden: Tensor, prompts: list[Tensor], uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw the first tokens of G samples of each of P prompts.

        hidden: (P, D) hidden states of the prompts' last tokens.
        prompts: P tensors of the prompts' tokens, for the repetition penalty.
        uniform: (P·G,) fp32 in [0, 1).

        Returns tokens (P·G,) int64 and log-probabilities (P·G,) fp32.
        """
        logits = self.head(hidden)
        seen = None
        if self.seen is not None:
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row, ids in zip(seen, prompts, strict=True):
                row[ids.to(row.device)] = True

        group = len(uniform) // len(hidden)
        rows = torch.arange(len(uniform), device=logits.device) // group
        uniform = uniform.to(logits.device)
        drawn = []
        for some, values in zip(rows.split(MOST_SAMPLES), uniform.split(MOST_SAMPLES), strict=True):
            seen_by_some = None if seen is None else seen[some]
            drawn.append(
                draw_tokens(logits[some], values, self.sampling, self.banned, seen_by_some)
            )
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    def reset_seen(self, span: int, prompt: Tensor) -> None:
        """Make the tokens of `prompt` the only ones seen by a new sample, which takes `span`."""
        if self.seen is not None:
            self.seen[span] = False
            self.seen[span, prompt.to(self.seen.device)] = True

    def hidden(self, tokens: Tensor, position: Tensor, spans: Tensor) -> Tensor:
        """Compute the final hidden states (R, D) of one new token for each row.

        Adds the new tokens' keys and values to the pool.

        tokens, position: (R,); spans: (R, 4) int32, as `attend` takes them.
        """
        residual, update = self.text.embed_tokens(tokens), None
        cos, sin = self.cos[position], self.sin[position]
        for layer, keys, values in zip(self.layers, self.pool.keys, self.pool.values, strict=True):
            residual, x = normed(layer.norm1, residual, update, layer.qkv.upcoming)
            q, k, v = (part.view(len(x), -1, keys.shape[-1]) for part in layer.qkv.outputs(x))
            upcoming = (*layer.out.upcoming, *layer.gate_up.upcoming)
            attended = attend(
                q, k, v, cos, sin, keys, values, spans, layer.scaling, layer.head_norms, upcoming
            )
            update = layer.out.parts(attended.flatten(1))

            residual, x = normed(layer.norm2, residual, update, layer.gate_up.upcoming)
            update = layer.down.parts(layer.gate_up.gated(x))

        _, x = normed(self.norm, residual, update, (self.head.weight,))
        return x
