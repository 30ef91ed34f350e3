"""What a run writes and shows: its folder, its figures, the progress bar, and optional loggers."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from . import torchrun
from .config import TrainConfig
from .errors import UserError, stops_at_once
from .files import RESUME, append_line, shorten, write_json
from .kept_records import COMPLETIONS, EVALUATION, EVALUATIONS, METRICS, KeptRecords
from .loggers import LOGGERS, Background, Logger, LoggerRun, choose_samples, close_all
from .report.records import PROCESSES, read_lines
from .resuming import (
    AUTO,
    CONFIG,
    can_begin_again,
    has_checkpoint,
    resume_command,
    saved_settings,
    write_config,
)
from .rewards import Scores
from .run_folder import require_room, run_folder
from .types import Rollout


class RunLog:
    """The run folder, and everything that is reported at each step.

    A context manager, whose end closes it; after a second signal that waits for no logger.

    Nothing is written before `create`, so that a run which cannot begin leaves no folder and spoils
    no older one. A resumed run drops the lines of the steps that come after its checkpoint, and
    writes them again.
    """

    LIVE = ("reward", "accuracy", "kl", "beta", "completion_length")
    """Metrics that stand beside the progress bar."""
    TABLES = 20
    """Steps of a run whose samples the loggers get, about evenly spread."""

    def __init__(self, config: TrainConfig, loggers: Sequence[str] | None = None):
        self.config = config
        self.folder = run_folder(config)
        # With `auto` here, there was no checkpoint; one that has ended before its first is no run.
        self.resuming = config.resume not in (None, AUTO)
        if not self.resuming:
            require_room(self.folder, begins_again=config.resume == AUTO)
        self.total = config.steps
        self.final_stands = False
        """Whether this process has written final/ of this run."""
        self._logged = LoggerRun(self.folder, saved_settings(config), self.resuming)
        self._found: dict[str, Logger] = {
            name: LOGGERS[name](self._logged)
            for name in (config.loggers if loggers is None else loggers)
        }
        self.loggers: list[Background] = []
        self.bar: tqdm | None = None
        self._kept: KeptRecords | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        """The folder of the weights with the highest accuracy so far, for `--keep-best`."""
        return self.folder / "best"

    @property
    def evaluations(self) -> Path:
        """The file with the evaluations on the way, a line of JSON for each."""
        return self.folder / EVALUATIONS

    def check(self, step: int) -> None:
        """Look at what earlier processes have recorded of a resumed run's first `step` steps.

        Says what is missing; raises UserError for a record that is damaged.
        """
        if self._logged.problem:
            self.say(self._logged.problem)
        self._kept = KeptRecords(self.folder, step, self.config)
        for sentence in self._kept.missing:
            self.say(sentence)

    def create(self, step: int = 0, processes: dict | None = None) -> None:
        """Make the folder with the run's settings, and open the loggers, after `step` steps.

        `processes` are `processes` and `sharding` for the report, where several train together.
        Call it once model and data have been loaded.
        """
        way_out = RESUME if self.resuming else "choose another folder with --output"
        write_config(self.config, self.folder / CONFIG, way_out)
        try:
            if processes:
                write_json(self.folder / PROCESSES, processes, way_out)
            else:  # those of an earlier start
                (self.folder / PROCESSES).unlink(missing_ok=True)
            if not self.resuming:  # an earlier run may have ended here before its first checkpoint
                (self.folder / EVALUATION).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be removed ({error.strerror}): move it away."
            ) from error
        if not self.resuming:
            for name in (METRICS, COMPLETIONS, EVALUATIONS):
                shorten(self.folder / name, 0, way_out)
        if self._found:
            evaluated = 1 + max(
                (record["step"] for record in read_lines(self.evaluations)), default=-1
            )
            known = {
                "known_steps": self._logged.known("steps", _steps_in(self.folder / METRICS)),
                "known_evaluations": self._logged.known("evaluations", evaluated),
            }
            self.loggers = [
                Background(name, logger, self.say, **known) for name, logger in self._found.items()
            ]
        for logger in self.loggers:
            logger.open(step)

    def start(self, step: int) -> None:
        """Begin the progress bar after `step` finished steps; 0 for a new run."""
        if self.resuming:
            kept = self._kept or KeptRecords(self.folder, step, self.config)
            for name, end in kept.ends.items():
                shorten(self.folder / name, end)
            # A logger that rewrites has dropped what it had of `step`, which is not made again.
            self._log_evaluations(
                record for record in read_lines(self.evaluations) if record["step"] == step
            )
        self.bar = tqdm(
            total=self.total, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of step `step`, counted from 0, which has finished."""
        append_line(self.folder / METRICS, {"step": step, **metrics})
        for logger in self.loggers:
            logger.log(metrics, step)
        live = [f"{name} {metrics[name]:.3g}" for name in self.LIVE if name in metrics]
        live = live or [f"loss {metrics['loss']:.4f}"]
        if metrics.get("skipped"):
            live.append("skipped")
        if "mfu_update" in metrics:  # only on a card whose peak is known
            live.append(f"mfu {metrics['mfu_update']:.0%}")
        self.bar.set_postfix_str(" · ".join(live), refresh=False)
        self.bar.update()

    def evaluation(self, record: dict) -> None:
        """Record an evaluation on the way: `step`, the steps done before it, and its figures."""
        append_line(self.evaluations, record)
        self._log_evaluations([record])

    def _log_evaluations(self, records: Iterable[dict]) -> None:
        for record in records:
            for logger in self.loggers:
                logger.evaluation({"held_out_accuracy": record["accuracy"]}, record["step"])

    def completions(self, step: int, rollout: Rollout, scores: Scores) -> None:
        """Record the completions of a step with their rewards: a line for each prompt."""
        if self.loggers and step % math.ceil(self.total / self.TABLES) == 0:
            samples = choose_samples(rollout, scores)
            for logger in self.loggers:
                logger.samples(samples, step)
        size = rollout.num_generations
        for row, example in enumerate(rollout.examples):
            samples = [
                {
                    "text": rollout.texts[i],
                    "reward": float(scores.total[row, i - row * size]),
                    **{name: values[i] for name, values in scores.parts.items()},
                    "why": scores.why[i],
                    "reason": rollout.reasons[i],
                }
                for i in range(row * size, (row + 1) * size)
            ]
            record = {
                "step": step,
                "key": example.key,
                "problem": example.problem,
                "solution": example.solution,
            }
            append_line(self.folder / COMPLETIONS, {**record, "completions": samples})

    def way_on(self) -> str:
        """Say how a run that was stopped goes on."""
        final = f"{self.folder / 'final'} is whole"
        starter = "python" if torchrun.size() == 1 else "torchrun …"
        resume = resume_command(self.folder, starter)
        if has_checkpoint(self.folder):
            # An earlier process may have left final/ of fewer steps, but this one has not.
            if self.final_stands:
                return f"{final}; {resume} makes what is missing of evaluation, card and upload"
            return f"go on with {resume}"
        if (self.folder / "final").exists():
            return final
        if can_begin_again(self.folder):
            return f"nothing was saved yet, so begin again with {resume}"
        return "nothing was saved yet, so start it again"

    def say(self, text: str) -> None:
        """Print text without breaking the progress bar."""
        tqdm.write(text)

    def end_steps(self) -> None:
        """End the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(0.0 if stops_at_once(error) else None)

    def close(self, seconds: float | None = None) -> None:
        """End the progress bar and the loggers, and wait for them as `close_all` does."""
        self.end_steps()
        close_all(self.loggers, seconds)


def _steps_in(metrics: Path) -> int:
    """Count the steps whose metrics an earlier process has written whole."""
    return sum(1 for _ in read_lines(metrics))
