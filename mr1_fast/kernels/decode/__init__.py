"""The operations of one decode step: one new token for every row of a rollout.

    attend        rotation of q and k, append to the pool, softmax(q·Kᵀ·scale)·V over two spans
    linears       x·Wᵀ + b of up to three layers in one launch: queries, keys, values
    swiglu        silu(x·gateᵀ) · (x·upᵀ)
    linear_parts  x·Wᵀ in parts over D, which the next norm adds up
    sample        a token of softmax(logits / T) by its inverse distribution function, and its
                  log-probability

A row is one completion. Its cached tokens are two spans of a pool: a prefix, which the G samples of
a prompt share, and its own tokens.

Never stored: scores, repeated prefixes, probabilities over the vocabulary, the products inside
swiglu. Bytes of a step: own keys and values once, those of a shared prefix once for each aligned
block of 8 rows, the weights once, the logits once.

dtype contract: fp32, bf16 or fp16, and fp64 through PyTorch. Softmax, sums and log-probabilities
are computed in fp32, for fp64 in fp64. What transformers rounds to the model's dtype is rounded
here, too, so that a rollout's log-probabilities stay close to those of training.

    reference.py         the operations in PyTorch, which also run on a CPU
    operations.py        the public functions, and which back end takes a call
    attention_triton.py  attend on a GPU; its loops over tokens: attention_spans_triton.py
    attention_native.py  attend on a CPU, by csrc/decode_cpu.cpp
    operations_triton.py sampling on a GPU
    sample_native.py     sampling on a CPU, by csrc/sample_cpu.cpp
    layer.py             a linear layer with its adapter and a weight in 16 or 4 bits
    linear.py            the public functions of linear layers
    linear_triton.py     linear layers on a GPU: one kernel for all of them
    linear_tiles.py      how much of them a program computes at a time
    linear_weights.py    what the kernel reads of a layer
    dot_triton.py        the matrix product that the Triton kernels share
"""
