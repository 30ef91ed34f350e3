"""verl's `linear_cross_entropy`: its definition in plain PyTorch, and ours with the same arguments.

    python examples/verl_loss.py

1,024 tokens (hidden size 256), a vocabulary of 32,000 and one thread of a CPU, fp32. Compared are
log-probs, entropy, and the gradients that a policy loss with an entropy bonus sends through both.
Takes about 15 seconds; verl is not needed.
"""

import statistics
import time

import torch

from mr1_fast.integrations.verl import linear_cross_entropy

T, D, V, TEMPERATURE, ROUNDS = 1024, 256, 32_000, 1.5, 5


def definition(hidden, weight, labels, temperature):
    """Return log-probs and entropy as verl's own tests define them for its kernels."""
    logits = hidden @ weight.T / temperature
    entropy = torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)
    return -torch.nn.functional.cross_entropy(logits, labels, reduction="none"), entropy


def main() -> None:
    """Call both functions in turn, and compare."""
    # Threads that wait for a core which others use would time the machine, not the functions.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(T, D, requires_grad=True)
    weight = torch.randn(V, D).mul(4 / D**0.5).requires_grad_()
    labels, advantages = torch.randint(0, V, (T,)), torch.randn(T)
    functions = {"definition": definition, "ours": linear_cross_entropy}
    seconds, results = {name: [] for name in functions}, {}
    for _ in range(1 + ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            logp, entropy = function(hidden, weight, labels, TEMPERATURE)
            loss = -(advantages * logp + 0.01 * entropy).mean()
            gradients = torch.autograd.grad(loss, (hidden, weight))
            seconds[name].append(time.perf_counter() - start)
            results[name] = logp.detach(), entropy.detach(), *gradients

    # The first round is a warm-up.
    median = {name: 1000 * statistics.median(taken[1:]) for name, taken in seconds.items()}
    for name, (logp, entropy, *_) in results.items():
        means = f"mean log-prob {logp.mean():.6f}, mean entropy {entropy.mean():.6f}"
        print(f"{name:10}  {means}, {median[name]:6.0f} ms")
    names = ("log-prob", "entropy", "gradient of hidden", "gradient of weight")
    for name, theirs, ours in zip(names, *results.values(), strict=True):
        difference = (theirs - ours).abs().max() / theirs.abs().max()
        print(f"{name}: largest difference {difference:.1e} of the largest value")
    print(f"the definition's time / ours: {median['definition'] / median['ours']:.2f}")


if __name__ == "__main__":
    main()
