"""The GRPO loss and its gradients, on logits (N, V), and on hidden states (N, D) with an LM head.

Fused: temperature, log-softmax, entropy, k3, the surrogate, and the gradient of all of it by the
logits. With a token's logits x (V,), temperature T and z = x/T, everything follows from one read of
the row:

    logp = z[target] − log Σ exp z    entropy = −Σ p·log p    dloss/dx = dloss/dlogp·(onehot − p)/T

The loss of a token therefore yields one number, dloss/dlogp, and the gradient can take the place of
the logits.

Never stored: probabilities, log-probabilities over V, a mask over V; on hidden states, logits of
more than a chunk of rows. Bytes that must move: one read and one write of the logits.

The dtype contract: logits in fp32, bf16 or fp16 (fp64 through PyTorch); statistics,
log-probabilities, KL and loss in fp32 (fp64 for fp64 logits). Near the start of training the KL is
1e-3…1e-4, below what bf16 can resolve.

The chapters of this kernel, in the order to read them:

1. `objective.py`: what the loss depends on beside the logits, and what it yields
2. `reference.py`: the equations in PyTorch, the specification of all that follows
3. `rows_torch.py`, `rows_triton.py`, `rows_native.py` (csrc/ on a CPU) and `rows_cuda.py` (csrc/ on
   a GPU): the row operations, with their kernels and launchers; `rows.py` chooses among them
4. `operators.py`: the operators of `torch.library` on logits, with gradients
5. `chunks.py`: how many rows of logits the fused head makes at a time; `head.py`: its GEMMs and
   sums; `linear.py`: the operators on hidden states

The public functions, which check their arguments, stand in `mr1_fast.loss`.
"""
