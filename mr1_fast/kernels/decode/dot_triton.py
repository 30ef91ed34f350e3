"""The matrix product of the decode kernels in Triton."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, accumulator):
    """Add the product a·b of two tiles to an fp32 accumulator, without TF32."""
    if _INTERPRETED:  # Triton's interpreter would multiply the bits of bf16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
