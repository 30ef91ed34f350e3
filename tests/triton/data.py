"""What tests of the Triton kernels share."""

import torch

from mr1_fast.kernels.grpo import rows_triton
from mr1_fast.kernels.grpo.objective import Objective, RowResults
from mr1_fast.kernels.grpo.rows_triton import LossTile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def objective(data, surrogate: str = "clip", beta=0.1) -> Objective:
    device = data["logits"].device
    return Objective(
        advantages=data["advantages"],
        token_weights=data["token_weights"],
        beta=torch.tensor(beta, device=device),
        temperature=torch.tensor(0.9, device=device),
        old_logp=data["old_logp"],
        ref_logp=data["ref_logp"],
        is_weights=data["is_weights"],
        surrogate=surrogate,
        clip_high=0.28,
        delta=1.6,
        tau_negative=1.1,
    )


def tile_of(columns: int, dtype: torch.dtype) -> LossTile:
    """The setting by which a program holds `columns` logits of this dtype."""
    return LossTile(columns * dtype.itemsize // 2, 4, 0)


def run_rows(data, out, columns: int, **settings) -> RowResults:
    """The loss where a program holds `columns` logits."""
    logits = data["logits"]
    results = RowResults.empty(logits)
    tile = tile_of(columns, logits.dtype)
    rows_triton.row_grpo(logits, data["targets"], objective(data, **settings), results, out, tile)
    return results
