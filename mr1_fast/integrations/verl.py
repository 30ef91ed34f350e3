"""verl's fused LM heads on this package's kernels, with verl's arguments, on any device; verl itself is not needed.

    from importlib import import_module  # verl imports the functions anew at each forward, so that a model uses these
    from mr1_fast.integrations.verl import FusedLinearForPPO, linear_cross_entropy

    # with fused_kernel_options.impl_backend=triton, and with =torch:
    import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy = linear_cross_entropy
    import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO = FusedLinearForPPO

Where verl differs:

- it computes the gradient of the weight always, also of a frozen one; here that is no work.
- its Triton kernels need CUDA and a hidden size that is a multiple of 128. Until 2026-02 they counted columns that are
  not there where V is no multiple of 256, as Qwen2-VL-2B's is not: log-probs above 0 (verl#2656, fixed by #5349).
- its PyTorch version divides by the temperature in bf16, and returns a bf16 entropy; here both are fp32.
- it checks no labels. Here, on a CPU, one outside [0, V) is an error: give masked positions any token.
- in its first version the fourth argument was `reduction`, the fifth `temperature`; here it is as it has been since.
"""

from torch import Tensor, nn

from ..loss import linear_token_logprobs

__all__ = ["FusedLinearForPPO", "linear_cross_entropy"]

REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels and entropy, fp32, of softmax(hidden @ weightᵀ / temperature); gradients through both.

    `hidden` (T, D) or (B, T, D), `weight` (V, D), `labels` (T,) or (B, T): both results are flat, (T,) or (B·T,), as
    verl's are. `reduction` "sum" or "mean" makes one number of the log-probs (they keep their sign: not a loss), and
    leaves the entropy as it is. Raises ValueError, also for a `dist_process_group` of several processes.
    """
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise ValueError(
            f"dist_process_group has {dist_process_group.size()} processes: an LM head whose vocabulary is split among "
            "them is not supported; gather the weight, or keep verl's kernel"
        )
    if reduction.lower() not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    logp, entropy = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.flatten(), temperature
    )
    return logp if reduction.lower() == "none" else getattr(logp, reduction.lower())(), entropy


class FusedLinearForPPO(nn.Module):
    """The same in the shape of the labels, (T,) or (B, T); logits exist for `chunk_size` rows at a time."""

    def __init__(self, chunk_size: int = 512):
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy), fp32."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        budget = self.chunk_size * vocab_weights.shape[0] * hidden_states.element_size()
        both = linear_token_logprobs(
            rows, vocab_weights, input_ids.flatten(), temperature, chunk_bytes=budget
        )
        logp, entropy = (each.view(input_ids.shape) for each in both)
        return logp, entropy
