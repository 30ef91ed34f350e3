"""The most bytes of tensors that a call has alive at once on the CPU, as torch's profiler saw every allocation."""

from collections.abc import Callable

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes at once of what `call` allocates, also inside operators; what was there before does not count.

    `call` must free nothing that it did not allocate.
    """
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
