"""The device's part of decoding: one new token for each of R running samples.

A step takes a small table of integers, which tells for every row which token to go on from and
where its keys and values are (table.py), and gives tokens and log-probabilities. All else stays on
the host (engine.py, schedule.py): a step knows nothing of prompts, lengths or ends, so that a CUDA
graph can hold it (graphs.py).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.decode.layer import Layer
from ..kernels.decode.linear import linears, swiglu
from ..kernels.decode.operations import attend
from ..kernels.layers.operations import add_norm, norm, silu_mul
from ..model.forward import base_model
from .cache import Pool
from .sampling import Sampling, draw_tokens
from .table import MOST_SAMPLES, SPAN_COLUMNS, Columns

Wait = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Waits for a step's tokens (R,) and log-probabilities (R,), and returns them."""


class Decoder:
    """Decodes up to `rows` samples at once, with a model's current weights and a pool."""

    ahead = 0
    """Steps that may be launched before the host has looked at the results of the step before."""

    def __init__(self, model: nn.Module, pool: Pool, sampling: Sampling, rows: int):
        base = base_model(model)
        self.text, self.head = base.model.language_model, base.lm_head
        self.pool, self.sampling = pool, sampling
        # A sampled placeholder would ask the next forward for an image feature that does not exist.
        self.banned = (base.config.image_token_id, base.config.video_token_id)
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
        cos, sin = self.angles(residual, position)
        for layer, keys, values in zip(
            self.text.layers, self.pool.keys, self.pool.values, strict=True
        ):
            attention, mlp = layer.self_attn, layer.mlp

            residual, x = normed(residual, update, layer.input_layernorm)
            projected = project(x, attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (part.view(len(x), -1, keys.shape[-1]) for part in projected)
            attended = attend(q, k, v, cos, sin, keys, values, spans, attention.scaling)
            update = attention.o_proj(attended.flatten(1))

            residual, x = normed(residual, update, layer.post_attention_layernorm)
            update = mlp.down_proj(gated(x, mlp.gate_proj, mlp.up_proj))

        _, x = normed(residual, update, self.text.norm)
        return x

    def angles(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the cosine and sine (R, d) of text positions (R,), in the dtype of x (R, D).

        A text position is the same in M-RoPE's three axes, and so are its angles.
        """
        cos, sin = self.text.rotary_emb(x[None], position.expand(3, 1, -1))
        # Older versions of transformers give angles for each axis, (3, 1, R, d); newer (1, R, d).
        return cos.flatten(0, -3)[0], sin.flatten(0, -3)[0]


def normed(
    residual: Tensor, update: Tensor | None, norm_module: nn.Module
) -> tuple[Tensor, Tensor]:
    """Compute residual + update, and its norm: (R, D) each."""
    weight, eps = norm_module.weight, norm_module.variance_epsilon
    if update is None:
        return residual, norm(residual, weight, None, eps)
    return add_norm(residual, update, weight, None, eps)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Apply each of the layers to x (R, D), in one launch where all of them are plain.

    Layers with adapters or 4-bit weights are called one by one.
    """
    if all(type(layer) is nn.Linear for layer in layers):
        return linears(x, [Layer(layer.weight, layer.bias) for layer in layers])
    return tuple(layer(x) for layer in layers)


def gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """Compute silu(gate(x)) · up(x), in one launch where both layers are plain and without bias."""
    if type(gate) is type(up) is nn.Linear and gate.bias is up.bias is None:
        return swiglu(x, Layer(gate.weight), Layer(up.weight))
    return silu_mul(torch.cat([gate(x), up(x)], dim=1), None)
