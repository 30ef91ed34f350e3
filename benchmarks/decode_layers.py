"""Whole layers of the language model with random weights, as the engine decodes with them."""

from collections.abc import Callable
from functools import partial

import torch
from decode_cases import GROUP, OWN, PREFIX
from random_models import model_config, processor_of, random_model
from torch import Tensor, nn

from mr1_fast.model.families import text_model
from mr1_fast.rollout.cache import Layout, Pool
from mr1_fast.rollout.decoder import Decoder, decoder_layers
from mr1_fast.rollout.sampling import Sampling


def random_layers(
    size: str, kind: str, layers: int, rows: int, device: str, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A function that computes the final hidden states (R, D) of a step through so many layers.

    size: as `model_config` takes it; kind: as in decode_cases.py.
    """
    config = model_config(size, processor_of(size), layers)
    kinds = dict(lora="_lora" in kind, four_bit="_four_bit" in kind)
    return decoding(random_model(config, device, dtype, **kinds), rows)


def decoding(model: nn.Module, rows: int) -> Callable[[], Tensor]:
    """`Decoder.hidden` for rows in groups, each in the middle of its completion."""
    text = text_model(model)
    device = text.norm.weight.device
    prefix, own = (PREFIX, OWN) if device.type == "cuda" else (20, 6)
    layout = Layout(-(-rows // GROUP), prefix, rows, own)
    pool = Pool(text, layout)
    for each in (pool.keys, pool.values):
        each.normal_()
    decoder = Decoder(model, decoder_layers(model), pool, Sampling(), rows)
    row = torch.arange(rows, dtype=torch.int32, device=device)
    spans = torch.stack(
        [
            layout.prompt_start(row // GROUP),
            torch.full_like(row, prefix),
            layout.sample_start(row),
            torch.full_like(row, own),
        ],
        dim=1,
    )
    tokens = torch.arange(rows, device=device) % text.embed_tokens.num_embeddings
    return partial(decoder.hidden, tokens, torch.full_like(tokens, prefix + own - 1), spans)
