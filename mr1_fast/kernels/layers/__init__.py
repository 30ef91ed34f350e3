"""The element-wise operations of a transformer layer, fused, with their gradients.

    add_norm     r = x + update, and the RMS norm of r (LayerNorm where there is a bias)
    rotary       the bias of q, k and v, and the rotation of q and k by their positions
    norm_rotary  the RMS norm of each head of q and k, and its rotation by their positions
    silu_mul     silu(gate) · up, with the bias of both
    gelu         x · sigmoid(1.702 x), or the approximation by a hyperbolic tangent

Between them, a layer consists of matrix products and attention alone. Each is one pass forward and
one backward. What a backward needs beside the inputs (a row's mean and variance, the gate's
sigmoid) it computes again from the inputs, which it reads anyway. On the way it writes the output
of the forward once more, where the weight gradient of the next matrix product needs that. So only
outputs of matrix products and of attention are kept between forward and backward.

Never stored: statistics of rows, fp32 copies, standardised rows before their weight, sums with a
bias, silu(gate).

Numbers that must move, in the layer's dtype; T tokens have H heads and K key heads of d channels:

                  forward                        backward
    norm          2·T·D                          3·T·D; 1·T·D more for dresidual, and for normed
    add_norm      4·T·D                          that of the norm, with dresidual
    rotary        2·T·(H + 2K)·d + 2·T·d         2·T·(H + 2K)·d + 2·T·d
    norm_rotary   2·T·(H + K)·d + 2·T·d          3·T·(H + K)·d + 2·T·K·d + 2·T·d
    silu_mul      3·T·F                          6·T·F
    gelu          2·T·F                          4·T·F

dtype contract: fp32, bf16 or fp16, and fp64 through PyTorch. Statistics of a row and the sums of
weight gradients are fp32, for fp64 in fp64; the RMS norm itself is computed in fp32 even for fp64,
because transformers does so. What transformers rounds to the model's dtype is rounded here, too,
but for gradients, which are rounded where theirs are or at their end alone.

Values need neither norm nor rotation: where there is no bias, they are a view of the product, whose
queries and keys the gradient of the norms needs.

Backward sums over tokens (dweight, dbias of a norm) are added up by a fixed number of programs,
each of which goes through its rows in order: the results are the same in every run.

    reference.py      the operations in PyTorch, which also run on a CPU
    operations.py     the public functions, and which back end takes a call
    norm_triton.py    the norms on a GPU
    layers_native.py  the RMS norm and the gating on a CPU, by csrc/layers_cpu.cpp
    rotary_triton.py  the rotary embedding on a GPU
    norm_rotary_triton.py  the same with norms of the heads
    gate_triton.py    the gating and the activation on a GPU
    strides.py        what these expect of strides
    operators.py      the operators of torch.library, differentiable
"""
