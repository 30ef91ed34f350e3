"""verl's fused LM heads on this package's kernels, with the arguments of verl 0.9.1, anywhere.

verl itself is not needed. To put both functions into it:

    from importlib import import_module
    from mr1_fast.integrations.verl import FusedLinearForPPO, linear_cross_entropy

    # with fused_kernel_options.impl_backend=triton:
    kernel = import_module("verl.utils.kernel.linear_cross_entropy")
    kernel.linear_cross_entropy = linear_cross_entropy
    # with fused_kernel_options.impl_backend=torch or liger:
    import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO = FusedLinearForPPO

verl imports these functions anew in each forward, so models use the replacements. Where verl
differs:

- verl always computes the gradient of the weight; here a frozen weight costs nothing.
- verl's Triton kernels need CUDA and a hidden size that is a multiple of 128. Until February 2026
  they counted columns beyond the vocabulary if V is not a multiple of 256, as for Qwen2-VL-2B, and
  returned log-probs above 0 (verl#2656, fixed by #5349).
- verl's PyTorch version divides by the temperature in bf16 and returns a bf16 entropy; here both
  are fp32.
- Logits of 16-bit hidden states are kept in fp32, as in verl's Triton kernels, of half as many rows
  at a time.
- verl does not check labels. Here, on a CPU, a label outside [0, V) is an error: give masked
  positions any token.
- In verl's first version the fourth argument was `reduction` and the fifth `temperature`; the order
  here is that of later versions.
"""

from torch import Tensor, nn

from ..loss import linear_token_logprobs

__all__ = ["FusedLinearForPPO", "linear_cross_entropy"]

REDUCTIONS = ("none", "sum", "mean")
BACKENDS = ("torch", "liger")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs of the labels and entropy, fp32, of softmax(hidden @ weightᵀ / temperature).

    Both are differentiable.

    - hidden (T, D) or (B, T, D), weight (V, D), labels (T,) or (B, T). Both results are flat, (T,)
      or (B·T,), as verl's are.
    - reduction: "sum" or "mean" reduces the log-probs to one number; they keep their sign, so it is
      not a loss. The entropy is never reduced.

    Raises ValueError for another `reduction`, and for a `dist_process_group` of several processes.
    """
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise ValueError(
            f"dist_process_group has {dist_process_group.size()} processes: an LM head whose "
            "vocabulary is split among them is not supported; gather the weight, or keep verl's "
            "kernel"
        )
    reduction = reduction.lower()
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    logp, entropy = linear_token_logprobs(
        rows, weight, labels.flatten(), temperature, wide_logits=True
    )
    if reduction == "sum":
        logp = logp.sum()
    elif reduction == "mean":
        logp = logp.mean()
    return logp, entropy


class FusedLinearForPPO(nn.Module):
    """verl's fused LM head as a module; logits exist for `chunk_size` rows at a time.

    `impl_backend` chooses between verl's own implementations, "torch" and "liger", and has no
    effect.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        if impl_backend not in BACKENDS:
            raise ValueError(
                f"impl_backend is {impl_backend!r}: choose one of {', '.join(BACKENDS)}"
            )
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs of `input_ids` (T,) or (B, T), and entropy, both fp32 and in its shape.

        `hidden_states` (T, D) or (B, T, D), `vocab_weights` (V, D).
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        chunk_bytes = self.chunk_size * vocab_weights.shape[0] * hidden_states.element_size()
        logp, entropy = linear_token_logprobs(
            rows,
            vocab_weights,
            input_ids.flatten(),
            temperature,
            chunk_bytes=chunk_bytes,
            wide_logits=True,
        )
        return logp.view(input_ids.shape), entropy.view(input_ids.shape)
