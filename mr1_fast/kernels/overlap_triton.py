"""Ways to keep the memory busy between the kernels of a decode step, as Triton functions.

Programmatic dependent launch (CUDA from sm_90 on): a kernel launched with `launch_pdl=True` may
begin while the kernel before it still runs. In every program it must then call
`wait_for_previous` before it reads or writes anything that others write; weights it may read
before. `let_next_begin` tells the GPU that the next such kernel may begin.

Prefetching: a kernel that leaves the memory idle loads the weights of the next ones into L2.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_IN_BULK = tl.constexpr(
    "{.reg .pred p; setp.ne.u32 p, $2, 0; "
    "@p cp.async.bulk.prefetch.L2.global [$1], 2048; mov.u32 $0, 0;}"
)
_BY_LINES = tl.constexpr(
    "{.reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}"
)


@triton.jit
def let_next_begin(DEPENDENT: tl.constexpr):
    """Let the next kernel of the stream begin, if it is launched with `launch_pdl`."""
    if DEPENDENT and not _INTERPRETED:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Wait until the kernels before have ended and what they wrote can be read."""
    if DEPENDENT and not _INTERPRETED:
        gdc_wait()


@triton.jit
def prefetch(
    UPCOMING, CHUNKS, program, programs,
    COUNT: tl.constexpr, IN_BULK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Load this program's share of the upcoming weights into L2, without waiting for them.

    UPCOMING, CHUNKS: COUNT pointers to bytes, and how many chunks of each (overlap.py): at most
    LANES, the threads of a program, for each program.
    """
    if not _INTERPRETED:
        SIZE: tl.constexpr = 2048 if IN_BULK else 128
        for i in tl.static_range(COUNT):
            chunk = program + programs * tl.arange(0, LANES)
            tl.inline_asm_elementwise(
                _IN_BULK if IN_BULK else _BY_LINES,
                "=r,l,r",
                [UPCOMING[i] + chunk.to(tl.int64) * SIZE, (chunk < CHUNKS[i]).to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
