"""Decode steps as CUDA graphs: captured once for each of a few numbers of rows, then replayed."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .decoder import Decoder, Wait
from .table import MOST_SAMPLES, Columns

GRAPH_ROWS = (1, 8, 32, 64, 128, 192, MOST_SAMPLES)
"""Rows of the captured graphs; a step takes the smallest graph that has rows enough.

Up to 64 rows, most linear layers go over their weights once, and idle rows cost a step little: most
tiles are the same for 16 rows as for 32, and capturing that size would take longer than it saves.
Beyond, the layers go over their weights again for every 64 rows, hence a size for each 64.
"""
SLOTS = 3
"""Steps whose inputs and results have pinned memory at the same time."""


@dataclass
class Slot:
    """Pinned host memory of one step, and the event after which its results are there."""

    table: Tensor
    """(rows, 8) int32, `Columns`."""
    uniform: Tensor
    """(rows,) fp32."""
    results: Tensor
    """(rows, 2) int32: tokens, and the bits of their fp32 log-probabilities."""
    done: torch.cuda.Event


class Graphs:
    """Launches the steps of a decoder of up to `rows` samples as CUDA graphs.

    A graph is captured when it is first needed. It reads the weights where they are, so it computes
    with their current values.

    A graph may have more rows than there are samples: a row without a sample goes on from token 0
    in the pool's scratch token. The host is one step behind, so that the device never waits for it.
    """

    ahead = 1
    """Steps that may be launched before the host has looked at the results of the step before."""

    def __init__(self, decoder: Decoder, rows: int):
        self.decoder, self.device = decoder, decoder.previous.device
        self.sizes = sorted({min(size, rows) for size in (*GRAPH_ROWS, rows)})
        self.table = torch.zeros(rows, len(Columns._fields), dtype=torch.int32, device=self.device)
        self.uniform = torch.zeros(rows, device=self.device)
        idle = Columns(
            token=0,
            source=0,
            position=0,
            prefix_start=0,
            prefix_len=0,
            own_start=0,
            own_len=1,
            span=decoder.pool.layout.sample_spans,
        )
        self.idle = torch.tensor(idle, dtype=torch.int32)
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.memory = torch.cuda.graph_pool_handle()
        self.slots = [self._slot(rows) for _ in range(SLOTS)]
        self.launched = 0

    def _slot(self, rows: int) -> Slot:
        """Allocate the pinned memory of a step of up to `rows` rows."""
        pinned = dict(dtype=torch.int32, pin_memory=True)
        return Slot(
            table=torch.zeros(rows, len(Columns._fields), **pinned),
            uniform=torch.zeros(rows, pin_memory=True),
            results=torch.zeros(rows, 2, **pinned),
            done=torch.cuda.Event(),
        )

    def launch(self, table: np.ndarray, uniform: np.ndarray) -> Wait:
        """`Decoder.launch`, without waiting for the device."""
        count = len(table)
        size = next(size for size in self.sizes if size >= count)
        if size not in self.captured:
            self.captured[size] = self._capture(size)
        graph, results = self.captured[size]

        slot = self.slots[self.launched % SLOTS]
        self.launched += 1
        slot.table[:count] = torch.from_numpy(table)
        slot.table[count:size] = self.idle
        slot.uniform[:count] = torch.from_numpy(uniform)
        self.table[:size].copy_(slot.table[:size], non_blocking=True)
        self.uniform[:size].copy_(slot.uniform[:size], non_blocking=True)

        graph.replay()
        slot.results[:size].copy_(results, non_blocking=True)
        slot.done.record()

        def wait() -> tuple[np.ndarray, np.ndarray]:
            slot.done.synchronize()
            found = slot.results[:count].numpy()
            return found[:, 0].copy(), found[:, 1].copy().view(np.float32)

        return wait

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture a step of `size` rows; returns the graph and the results it writes."""
        self.table[:size] = self.idle.to(self.device)
        stream, previous = capture_stream(self.device), self.decoder.previous.clone()

        # A first step outside of the graph compiles kernels and sets up libraries.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(size)
        torch.cuda.current_stream().wait_stream(stream)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, stream=stream):
            results = self._step(size)
        self.decoder.previous.copy_(previous)
        return graph, results

    def _step(self, size: int) -> Tensor:
        """Decode `size` rows; returns tokens and the bits of their log-probabilities, (size, 2)."""
        tokens, logprobs = self.decoder.step(self.table[:size], self.uniform[:size])
        return torch.stack([tokens.to(torch.int32), logprobs.view(torch.int32)], dim=1)


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's one stream for captures: cuBLAS keeps a work space for every stream."""
    return torch.cuda.Stream(device)
