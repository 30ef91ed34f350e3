"""The element-wise operations of a transformer layer, fused, with their gradients.

    add_norm    r = x + update, and the RMS norm of r (LayerNorm where there is a bias)
    rotary      the bias of q, k and v, and the rotation of q and k by their positions
    silu_mul    silu(gate) · up, with the bias of both
    quick_gelu  x · sigmoid(1.702 x)

Between them, a layer consists of matrix products and attention alone. Each is one pass forward and
one backward, and what a backward needs beside the inputs (a row's mean and variance, the gate's
sigmoid) is computed again from the inputs, which it reads anyway. On the way it writes the
operation's output once more, where a matrix product's weight gradient needs that: so only outputs
of matrix products and of attention are kept between forward and backward.

Never stored: statistics of rows, fp32 copies, x/r without its weight, q and k before their
rotation but in the matrix product's own output, silu(gate).

Elements that must move, with T tokens, in the dtype of the layer:

                 forward                       backward
    norm         2·T·D                         3·T·D, with_normed 4·T·D; dresidual 1·T·D more
    add_norm     4·T·D                         the norm's
    rotary       2·T·(H + 2K)·d + 2·T·d        2·T·(H + 2K)·d + 2·T·d
    silu_mul     3·T·F                         6·T·F
    quick_gelu   2·T·F                         4·T·F

dtype contract: fp32, bf16 or fp16, and fp64 through PyTorch. Statistics of a row and the sums of
weight gradients are fp32 (fp64 for fp64, except for the RMS norm's own mean square, which
transformers computes in fp32 always). What transformers rounds to the model's dtype is rounded
here, too; a gradient is rounded once, at its end.

Backward sums over tokens (dweight, dbias of a norm) are added up by a fixed number of programs,
each of which goes through its rows in order: the results are the same in every run.

    reference.py      the operations in PyTorch, which also run on a CPU
    operations.py     the public functions, and which back end takes a call
    norm_triton.py    the norms on a GPU
    rotary_triton.py  the rotary embedding on a GPU
    gate_triton.py    the gating and the activation on a GPU
    operators.py      the operators of torch.library, differentiable
"""
