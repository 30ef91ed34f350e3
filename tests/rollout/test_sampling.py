"""The tokens that are drawn follow the distribution that the settings ask for."""

import pytest
import torch

from mr1_fast.rollout.sampling import Sampling, draw_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOGITS = torch.tensor([1.5, 2.0, 1.0, 0.2, 0.0, -1.0, 9.0])
BANNED = (6,)
KEPT = {
    "temperature": (dict(temperature=0.6), [0, 1, 2, 3, 4, 5]),
    "top_k": (dict(top_k=3), [0, 1, 2]),
    # 0.44 + 0.27 < 0.8 <= 0.44 + 0.27 + 0.16: the third token crosses it and stays
    "top_p": (dict(top_p=0.8), [0, 1, 2]),
    "top_p alone": (dict(top_p=0.4), [1]),
    "min_p": (dict(min_p=0.3), [0, 1, 2]),
    "all": (dict(temperature=2.0, top_k=5, top_p=0.9, min_p=0.4), [0, 1, 2, 3]),
}


@pytest.mark.parametrize("case", KEPT)
def test_draws_follow_the_filtered_distribution(case):
    settings, kept = KEPT[case]
    count, sampling = 20_000, Sampling(1, **settings)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw_tokens(
        LOGITS.repeat(count, 1).to(DEVICE), uniform.to(DEVICE), sampling, BANNED
    )
    drawn = tokens.cpu().bincount(minlength=7).double()
    expected = torch.softmax(LOGITS[kept].double() / sampling.temperature, 0) * count
    assert drawn.sum() == drawn[kept].sum() == count
    statistic = ((drawn[kept] - expected) ** 2 / expected).sum()
    # 99.9% quantile of chi-square, by Wilson and Hilferty (1931)
    degrees = max(1, len(kept) - 1)
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    whole = torch.log_softmax(LOGITS.double() / sampling.temperature, 0)[tokens.cpu()]
    torch.testing.assert_close(logprobs.cpu(), whole.float(), atol=1e-5, rtol=0)
