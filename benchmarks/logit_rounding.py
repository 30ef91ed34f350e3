"""What it does to log-probs, ratios and the KL that logits are rounded to bf16.

    python benchmarks/logit_rounding.py

Of bf16 hidden states: log-probs of sampled tokens beside those of fp32 logits, as a rollout or
another trainer may keep them. Ten seconds on a CPU.
"""

import torch

from mr1_fast import linear_token_logprobs

ROWS, WIDTH, VOCABULARY = 512, 256, 32_000


def main() -> None:
    """Print a line for each size of the logits, rounded and not."""
    torch.manual_seed(0)
    for scale in (0.06, 0.25):
        hidden = torch.randn(ROWS, WIDTH).bfloat16()
        weight = (scale * torch.randn(VOCABULARY, WIDTH)).bfloat16()
        logits = hidden.float() @ weight.float().T
        ids = torch.distributions.Categorical(logits=logits).sample()
        exact = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for wide in (False, True):
            logp, _ = linear_token_logprobs(hidden, weight, ids, wide_logits=wide)
            d = exact - logp
            k3 = torch.expm1(d) - d
            print(
                f"logits to {logits.abs().max():.0f}, {'fp32' if wide else 'bf16'}: "
                f"log-prob off by {d.abs().mean():.1e} on average, {d.abs().max():.1e} at most, "
                f"ratio of equal weights by {torch.expm1(-d).abs().max():.1e}, "
                f"their KL {k3.mean():.1e} instead of 0"
            )


if __name__ == "__main__":
    main()
