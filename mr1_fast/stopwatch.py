"""How long the stages of a step take, and how much memory, on one process or on several."""

import time

import torch

from .distributed import SINGLE, World


class Stopwatch:
    """Measures the stages of a step: seconds, and on CUDA the peak of allocated memory in GiB.

    `laps` holds both under their names in metrics.jsonl, as this process has measured them. Of a
    stage with several laps it has the sum of the seconds and the largest peak.
    """

    def __init__(self, world: World = SINGLE):
        self.world = world
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def lap(self, stage: str) -> None:
        """Note the time since the last lap as that of `stage`.

        On CUDA this waits for the queued work first.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.laps[f"peak_gib_{stage}"] = max(peak, self.laps.get(f"peak_gib_{stage}", 0.0))
            torch.cuda.reset_peak_memory_stats()
        self._note(stage)

    def waited(self) -> None:
        """Note the time since the last lap as `seconds_wait`: spent on waiting for the others.

        A process alone waits for nobody, and notes nothing.
        """
        if self.world.size > 1:
            self._note("wait")

    def of_all(self) -> dict[str, float]:
        """Return the laps of all processes as one: of each stage the slowest one's seconds and the
        largest peak, and of the waiting the mean.

        Collective, like the methods of World: every process calls it, once its step has ended.
        """
        parts = self.world.gather(self.laps)
        names = dict.fromkeys(name for part in parts for name in part)
        laps = {name: max(part.get(name, 0.0) for part in parts) for name in names}
        if "seconds_wait" in laps:
            laps["seconds_wait"] = sum(part["seconds_wait"] for part in parts) / len(parts)
        return laps

    def _note(self, stage: str) -> None:
        now = time.perf_counter()
        seconds = self.laps.get(f"seconds_{stage}", 0.0) + now - self.last
        self.laps[f"seconds_{stage}"], self.last = seconds, now
