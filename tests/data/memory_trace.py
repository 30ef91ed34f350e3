"""The peak of memory that a call allocates, as torch counts every allocation."""

from collections.abc import Callable

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes at once of what `call` allocates, also inside operators.

    What existed before does not count, and `call` must not free any of it. On a CPU torch's
    profiler counts, on CUDA the allocator.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    sizes = [0]

    def visit(events) -> None:
        for event in events:
            if event.tag == _EventType.Allocation:
                sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
            visit(event.children)

    visit(profiler.profiler.kineto_results.experimental_event_tree())
    live = peak = 0
    for _, size in sorted(sizes[1:]):
        live += size
        peak = max(peak, live)
    return peak
