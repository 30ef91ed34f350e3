"""Weights in 4 bits, as bitsandbytes stores them: 16 levels (nf4 or fp4), scaled by blocks.

    w[i] = code[nibble i] · absmax[i // 64]                       fp32, then rounded to the dtype
    absmax[j] = absmax_code[q[j]] · absmax_scale[j // 256] + offset    with double quantisation

A byte has two numbers, the first in its high half. Blocks go on through the rows of a weight.

    weight.py             what a stored weight consists of
    operations.py         dequantise, by the fastest way of a device
    reference.py          dequantisation in PyTorch: the specification
    dequantise_triton.py  dequantisation in Triton, also for kernels that multiply

By arithmetic for an H100 and an RTX 4090, a product that dequantises inside can win up to about 300
rows: there, to write a weight in 16 bits and read it again takes 1.5 ps a number (4.8), which is
saved, but each 64 to 128 rows dequantise it anew (0.2 ps of instructions), beside a slower product.
With more rows, as in training and in prefill, dequantise first: of 6,144 rows it takes 4%.
"""
