"""Liger-Kernel's fused GRPO loss and ours, by a change of import: the same numbers, and both times.

    pip install liger-kernel && python examples/liger_loss.py

An LM head on one thread of a CPU, fp32, with 4 completions of up to 64 tokens, 28% of them padding.
Takes about 5 seconds.
"""

import statistics
import time

import torch

from mr1_fast.integrations.liger import LigerFusedLinearGRPOLoss as OurLoss

try:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as LigerLoss
except ImportError:
    raise SystemExit(
        "This example compares with Liger-Kernel, which is not installed: pip install liger-kernel"
    ) from None

B, T, D, V, ROUNDS = 4, 64, 128, 32_768, 5


def make_inputs() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what is trained (hidden states and LM head) and the loss' other inputs.

    Old and reference log-probs are near those of the policy.
    """
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, T, D), torch.randn(V, D) / D**0.5
    ids = torch.randint(0, V, (B, T))
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    constant = {
        "selected_token_ids": ids,
        "attention_mask": (torch.arange(T) < torch.tensor([64, 40, 55, 25])[:, None]).long(),
        "advantages": torch.randn(B),
        "old_per_token_logps": logp + 0.1 * torch.randn(B, T),
        "ref_per_token_logps": logp + 0.2 * torch.randn(B, T),
    }
    trained = {"_input": hidden.requires_grad_(), "lin_weight": weight.requires_grad_()}
    return trained, constant


def step(
    loss_function: torch.nn.Module, trained: dict, constant: dict
) -> tuple[float, float, list[torch.Tensor]]:
    """Return seconds, loss and gradients of one forward and backward."""
    start = time.perf_counter()
    loss, _ = loss_function(**trained, **constant)
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return time.perf_counter() - start, loss.item(), list(gradients)


def main() -> None:
    """Call both losses in turn, and compare."""
    # Threads that wait for a core which others use would time the machine, not the losses.
    torch.set_num_threads(1)
    trained, constant = make_inputs()
    # Liger compiles only its arithmetic on (B, T) values, which takes longer here than it saves.
    losses = {
        "Liger": LigerLoss(beta=0.04, compiled=False),
        "ours": OurLoss(beta=0.04, compiled=False),
    }
    seconds = {name: [] for name in losses}
    values, gradients = {}, {}
    for _ in range(1 + ROUNDS):
        for name, loss_function in losses.items():
            taken, values[name], gradients[name] = step(loss_function, trained, constant)
            seconds[name].append(taken)

    # The first round is a warm-up.
    median = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    for name, value in values.items():
        print(f"{name:5}  loss {value:.7f}  {1000 * median[name]:7.1f} ms")
    pairs = zip(gradients["Liger"], gradients["ours"], strict=True)
    difference = max(((liger - our).abs().max() / liger.abs().max()).item() for liger, our in pairs)
    print(f"largest difference of gradients, relative to the largest gradient: {difference:.1e}")
    print(f"Liger's time / ours: {median['Liger'] / median['ours']:.2f}")


if __name__ == "__main__":
    main()
