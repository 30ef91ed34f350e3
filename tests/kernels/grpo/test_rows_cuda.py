"""csrc/'s CUDA kernel against fp64, on a GPU: both its forms where the GPU has clusters."""

import pytest
import torch

from mr1_fast.kernels.grpo import rows_cuda
from mr1_fast.kernels.grpo.objective import Objective, RowResults

from ...data.loss import (
    assert_results_within_bound,
    assert_within_bound,
    double,
    loss_rows,
    objective_of,
    reference,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or rows_cuda.status()[0] is None,
    reason="needs a GPU and csrc/ built with nvcc",
)


@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [4096, 151936, 152064])
def test_loss_and_gradient(monkeypatch, v, dtype, clusters):
    if not clusters:
        monkeypatch.setattr(rows_cuda, "CLUSTERS", ((99, 0), (99, 9)))
    data = loss_rows(300, v, dtype, "cuda")
    arguments = objective_of(data, "old_logp", "ref_logp", "is_weights") | {"beta": 0.1}
    exact, exact_gradient = reference(data["logits"].double(), **double(arguments))
    eager, eager_gradient = reference(data["logits"], **arguments)
    objective = Objective(
        advantages=data["advantages"],
        token_weights=data["token_weights"],
        beta=torch.tensor(0.1, device="cuda"),
        temperature=torch.tensor(1.0, device="cuda"),
        old_logp=data["old_logp"],
        ref_logp=data["ref_logp"],
        is_weights=data["is_weights"],
    )
    logits = data["logits"].clone()
    results = RowResults.empty(logits)
    rows_cuda.row_grpo(logits, data["targets"], objective, results, logits)
    assert_results_within_bound(results._replace(loss=results.loss.sum()), eager, exact)
    assert_within_bound(logits, eager_gradient, exact_gradient, "gradient")
