"""Kernels, one package an operation: the GRPO loss, a layer, a rollout's decode step, AdamW.

Each package holds a reference in PyTorch, which is the specification and the oracle of the tests,
the kernels, the launchers that check and allocate, and the functions that choose among them. What
they share stands beside them: `dispatch` (which kernels take a tensor), `launch` (starting a Triton
kernel), `native` (loading csrc/'s libraries) and `self_test` (a small batch through all of them at
the start of a run).
"""
