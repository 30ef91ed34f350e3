"""Compare Liger-Kernel's fused GRPO loss with ours: only an import changes, and the numbers agree.

    pip install liger-kernel && python examples/liger_loss.py

It takes about 5 seconds on one thread of a CPU. The inputs are an LM head in fp32 and 4 completions
of up to 64 tokens, 28% of which is padding.
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
    """Make the inputs: what is trained (hidden states and LM head), and what is constant.

    The constant ones are token ids, mask, advantages, and the log-probs of a policy nearby.
    """
    torch.manual_seed(0)
    trained = {"_input": torch.randn(B, T, D), "lin_weight": torch.randn(V, D) / D**0.5}
    ids = torch.randint(0, V, (B, T))
    logp = (trained["_input"] @ trained["lin_weight"].T).log_softmax(-1)
    logp = logp.gather(-1, ids[..., None])[..., 0]
    constant = {
        "selected_token_ids": ids,
        "attention_mask": (torch.arange(T) < torch.tensor([64, 40, 55, 25])[:, None]).long(),
        "advantages": torch.randn(B),
        "old_per_token_logps": logp + 0.1 * torch.randn(B, T),
        "ref_per_token_logps": logp + 0.2 * torch.randn(B, T),
    }
    return {name: value.requires_grad_() for name, value in trained.items()}, constant


def step(
    loss_function: torch.nn.Module, trained: dict, constant: dict
) -> tuple[float, float, list[torch.Tensor]]:
    """Run one forward and backward; return its seconds, its loss and its gradients."""
    start = time.perf_counter()
    loss, _ = loss_function(**trained, **constant)
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return time.perf_counter() - start, loss.item(), list(gradients)


def main() -> None:
    """Run the two losses in turn, and print how they compare."""
    # Threads that wait for a core which others use would time the machine, not the losses.
    torch.set_num_threads(1)
    inputs = make_inputs()
    # Liger compiles only its arithmetic on (B, T) values, which takes longer here than it saves:
    # both go without.
    losses = {
        "Liger": LigerLoss(beta=0.04, compiled=False),
        "ours": OurLoss(beta=0.04, compiled=False),
    }
    results, seconds = {}, {name: [] for name in losses}
    for _ in range(1 + ROUNDS):
        for name, loss in losses.items():
            results[name] = step(loss, *inputs)
            seconds[name].append(results[name][0])
    # The first round warms up.
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, (_, loss, _) in results.items():
        print(f"{name:5}  loss {loss:.7f}  {1000 * median[name]:7.1f} ms")
    pairs = zip(*(gradients for _, _, gradients in results.values()), strict=True)
    differences = [((liger - our).abs().max() / liger.abs().max()).item() for liger, our in pairs]
    largest = max(differences)
    print(f"largest difference of gradients, relative to the largest gradient: {largest:.1e}")
    print(f"Liger's time / ours: {median['Liger'] / median['ours']:.2f}")


if __name__ == "__main__":
    main()
