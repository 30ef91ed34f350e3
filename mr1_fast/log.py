"""What a run writes and shows: its folder, its figures, the progress bar, and optional loggers."""

import math
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from . import torchrun
from .command_line import saved_settings, write_config
from .config import TrainConfig
from .errors import UserError, stops_at_once
from .files import append_line, keep_lines_before, write_json
from .loggers import LOGGERS, Background, Logger, LoggerRun, choose_samples, close_all
from .report.records import PROCESSES, read_lines
from .resuming import AUTO, saved_steps
from .rewards import Scores
from .types import Rollout

BEFORE_THE_FIRST = {
    *("config.yaml", PROCESSES, "memory.json", "evaluation.json", "images", "completions.jsonl"),
    *("evaluations.jsonl", "best", "report.html", "completions.html"),
    *("loggers.json", "tensorboard", "wandb", "trackio", "mlflow.db", "mlartifacts"),
}
"""Names that a run may leave if it fails before its first step; they may be overwritten."""
BEFORE_A_CHECKPOINT = {"metrics.jsonl", "checkpoints"}
"""What else there is of a run that was ended before its first checkpoint was whole."""


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
        of_no_worth = BEFORE_THE_FIRST | (BEFORE_A_CHECKPOINT if config.resume == AUTO else set())
        if not self.resuming and _holds_a_run(self.folder, of_no_worth):
            raise UserError(
                f"output {self.folder} is not empty: choose a new folder, or continue it with "
                "--resume."
            )
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
        return self.folder / "evaluations.jsonl"

    def create(self, step: int = 0, processes: dict | None = None) -> None:
        """Make the folder with the run's settings, and open the loggers, after `step` steps.

        `processes` are `processes` and `sharding` for the report, where several train together.
        Call it once model and data have been loaded.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_config(self.config, self.folder / "config.yaml")
            if processes:
                write_json(self.folder / PROCESSES, processes)
            else:  # those of an earlier start
                (self.folder / PROCESSES).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"output {self.folder} cannot be written ({error.strerror}): choose another."
            ) from error
        if not self.resuming:  # an earlier run may have ended here before its first step
            keep_lines_before(self.evaluations, 0)
        if self._found:
            evaluated = 1 + max(
                (record["step"] for record in read_lines(self.evaluations)), default=-1
            )
            known = {
                "known_steps": self._logged.known(
                    "steps", _steps_in(self.folder / "metrics.jsonl")
                ),
                "known_evaluations": self._logged.known("evaluations", evaluated),
            }
            self.loggers = [
                Background(name, logger, self.say, **known) for name, logger in self._found.items()
            ]
        for logger in self.loggers:
            logger.open(step)

    def start(self, step: int) -> None:
        """Begin the progress bar after `step` finished steps; 0 for a new run."""
        for name in ("metrics.jsonl", "completions.jsonl"):
            keep_lines_before(self.folder / name, step)
        keep_lines_before(self.evaluations, step + 1)  # one is made after its step
        if self.resuming:
            # A logger that rewrites has dropped what it had of `step`, which is not made again.
            self._log_evaluations(
                record for record in read_lines(self.evaluations) if record["step"] == step
            )
        self.bar = tqdm(
            total=self.total, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of step `step`, counted from 0, which has finished."""
        append_line(self.folder / "metrics.jsonl", {"step": step, **metrics})
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
            append_line(self.folder / "completions.jsonl", {**record, "completions": samples})

    def way_on(self) -> str:
        """Say how a run that was stopped goes on."""
        final = f"{self.folder / 'final'} is whole"
        starter = "python" if torchrun.size() == 1 else "torchrun …"
        resume = f"`{starter} -m mr1_fast.train --resume {shlex.quote(str(self.folder))}`"
        if saved_steps(self.checkpoints):
            # An earlier process may have left final/ of fewer steps, but this one has not.
            if self.final_stands:
                return f"{final}; {resume} makes what is missing of evaluation, card and upload"
            return f"go on with {resume}"
        if (self.folder / "final").exists():
            return final
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


def _holds_a_run(folder: Path, of_no_worth: set[str]) -> bool:
    """Say whether a folder holds anything but files and folders of these names.

    What a process that was killed had half written, or had left for others to see, does not count.
    """
    if not folder.exists():
        return False
    return not folder.is_dir() or any(
        path.name not in of_no_worth
        and not path.match(".*.partial")
        and not path.match(".seen-by-all-*")
        for path in folder.iterdir()
    )


def _steps_in(metrics: Path) -> int:
    """Count the steps whose metrics an earlier process has written whole."""
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def run_folder(config: TrainConfig) -> Path:
    """Return the run folder; without --output its name says time, task, algorithm and seed."""
    if config.output is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        config.output = str(Path("runs") / f"{stamp}-{config.task}-{config.algo}-seed{config.seed}")
    return Path(config.output)
