"""AdamW with 8-bit states on bf16 weights that lose no update, in one pass over a parameter.

Decoupled weight decay (AdamW, arXiv 1711.05101). With gradient g, learning rate η, weight decay λ
and step t, counted from 1:

    m = β₁·m + (1−β₁)·g        m̂ = m/(1−β₁ᵗ)
    v = β₂·v + (1−β₂)·g²       v̂ = v/(1−β₂ᵗ)
    w −= η·(m̂/(√v̂ + ε) + λ·w)

Fused into one pass: converting and clipping the gradient, decoding the states, the equations,
encoding the states, rounding the weight. No fp32 copy of a parameter, its gradient or its states is
ever stored. Bytes per parameter: 1 for m, 1 for v, 8/256 for their scales, 2 for a bf16 weight and
2 for its remainder.

dtype contract: weights and gradients in bf16 or fp32, arithmetic in fp32. Every operation is
rounded as IEEE 754 says and none is contracted, so PyTorch on a CPU and Triton give the same bits.

    reference.py     the equations of a step in ten lines of PyTorch
    state.py         the states of a parameter, and the numbers of a step
    rounding.py      the 8-bit codes, rounding at random, and the random numbers
    step.py          a step's public functions, by step_torch.py or step_triton.py
    optimizer.py     `LowMemoryAdamW`, the torch optimizer
"""
