"""What the package saves, each as something that can be interrupted at any call and checked then.

A Saving prepares a folder once. `operate` then saves; `check` says what must hold wherever that was
interrupted, saves again, and looks at the result.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mr1_fast import files
from mr1_fast.checkpoint import load_checkpoint, save_checkpoint
from mr1_fast.command_line import parse_train_config
from mr1_fast.distributed.sharding import Sharding
from mr1_fast.log import RunLog
from mr1_fast.report.records import end_before
from mr1_fast.resuming import AUTO, saved_steps, write_config

START = "0123456789abcdef"


class Saving:
    """Something that is saved below `folder`; without its parts it prepares and saves nothing."""

    def prepare(self, folder: Path) -> None:
        """Make what is there before."""

    def operate(self, folder: Path) -> None:
        """Save."""
        raise NotImplementedError

    def check(self, folder: Path) -> None:
        """Assert that nothing is lost, save again, and assert that all is as it should be."""
        raise NotImplementedError


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones, too; a folder is there by its name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in sorted(folder.rglob("*"))
    }


# --- checkpoints --------------------------------------------------------------------------------


class Training:
    """Weights and an optimizer, whose state after any number of steps is known."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.sharding = Sharding(self.model)
        self.done = 0

    def step(self) -> None:
        self.done += 1
        torch.manual_seed(self.done)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def save(self, folder: Path) -> None:
        save_checkpoint(folder, self.done, self.sharding, self.optimizer, START)

    def load(self, folder: Path) -> None:
        self.step()  # so that there are states to read into
        self.done = load_checkpoint(folder, self.sharding, self.optimizer, START)

    def state(self) -> dict[str, bytes]:
        state = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            state |= {f"{number}.{name}": value for name, value in values.items()}
        return {name: value.numpy().tobytes() for name, value in state.items()}


class Checkpoints(Saving):
    """Two checkpoints, one after the other, each of which removes the oldest."""

    LAST = 4

    def __init__(self) -> None:
        self.states: dict[int, dict[str, bytes]] = {}
        training = Training()
        for _ in range(self.LAST):
            training.step()
            self.states[training.done] = training.state()

    def prepare(self, folder: Path) -> None:
        training = Training()
        for _ in range(2):
            training.step()
            training.save(folder)

    def operate(self, folder: Path) -> None:
        training = Training()
        training.step(), training.step()
        while training.done < self.LAST:
            training.step()
            training.save(folder)

    def check(self, folder: Path) -> None:
        training = Training()
        training.load(folder)
        assert training.done >= 2
        assert training.state() == self.states[training.done]
        assert len(saved_steps(folder)) >= 2  # there is always a way back from a damaged one
        if training.done == self.LAST:  # the next save sweeps
            self.states[self.LAST + 1] = self.states.get(self.LAST + 1) or self._one_more()
            training.step()
            training.save(folder)
        while training.done < self.LAST:
            training.step()
            training.save(folder)
        names = {f"step-{training.done - back:06d}" for back in (0, 1)}
        assert {path.name for path in folder.iterdir() if path.name != ".lock"} == names
        again = Training()
        again.load(folder)
        assert again.state() == self.states[training.done]

    def _one_more(self) -> dict[str, bytes]:
        training = Training()
        for _ in range(self.LAST + 1):
            training.step()
        return training.state()


# --- folders and files --------------------------------------------------------------------------


def fill(folder: Path, value: float) -> None:
    """Write a folder as that of a model: tensors, JSON, and a folder in it."""
    save_file({"weight": torch.full((2000,), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"value": value}))
    (folder / "more").mkdir()
    (folder / "more" / "text.txt").write_text(str(value) * 5000)


class Folder(Saving):
    """A folder that replaces one, as final/ of a run that goes on for longer."""

    OLD: float | None = 1.0

    def prepare(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        if self.OLD is not None:
            (folder / "final").mkdir()
            fill(folder / "final", self.OLD)

    def operate(self, folder: Path) -> None:
        with files.atomic_folder(folder / "final") as temporary:
            fill(temporary, 2.0)

    def check(self, folder: Path) -> None:
        final = folder / "final"
        files.restore_folder(final)
        if self.OLD is not None or final.exists():
            assert content(final) in [self.whole(value) for value in (self.OLD, 2.0)]
        self.operate(folder)
        assert content(final) == self.whole(2.0)
        assert [path.name for path in folder.iterdir() if path.name != ".lock"] == ["final"]

    def whole(self, value: float | None) -> dict[str, bytes]:
        if value is None:
            return {}
        if value not in (known := self.__dict__.setdefault("known", {})):
            import tempfile

            with tempfile.TemporaryDirectory() as scratch:
                fill(Path(scratch), value)
                known[value] = content(Path(scratch))
        return known[value]


class NewFolder(Folder):
    """A folder where there is none, as a supervised start in the cache."""

    OLD = None


class Json(Saving):
    """evaluation.json, which is written twice."""

    def prepare(self, folder: Path) -> None:
        files.write_json(folder / "evaluation.json", {"before": [1] * 5000})

    def operate(self, folder: Path) -> None:
        files.write_json(folder / "evaluation.json", {"before": [1] * 5000, "after": [2] * 5000})

    def check(self, folder: Path) -> None:
        read = json.loads((folder / "evaluation.json").read_text())
        assert read["before"] == [1] * 5000 and read.get("after", [2] * 5000) == [2] * 5000
        self.operate(folder)
        assert "after" in json.loads((folder / "evaluation.json").read_text())
        assert {path.name for path in folder.iterdir()} <= {".lock", "evaluation.json"}


class Config(Saving):
    """config.yaml, which a resume writes again with another number of steps."""

    def settings(self, folder: Path, steps: int):
        return parse_train_config([f"--output={folder}", f"--steps={steps}", "--prompt-template=x"])

    def prepare(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_config(self.settings(folder, 10), folder / "config.yaml")

    def operate(self, folder: Path) -> None:
        write_config(self.settings(folder, 20), folder / "config.yaml")

    def check(self, folder: Path) -> None:
        read = parse_train_config(["--resume", str(folder)])
        assert read.steps in (10, 20)
        assert vars(read) == vars(self.settings(folder, read.steps)) | {"resume": AUTO}
        self.operate(folder)
        assert parse_train_config(["--resume", str(folder)]).steps == 20
        assert {path.name for path in folder.iterdir()} <= {".lock", "config.yaml"}


class Lines(Saving):
    """A log of lines, of which a resumed run drops those after its checkpoint, and adds others."""

    def line(self, step: int) -> dict:
        return {"step": step, "text": f"{step}é" * 3000}

    def prepare(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for step in range(4):
            files.append_line(folder / "metrics.jsonl", self.line(step))

    def operate(self, folder: Path) -> None:
        metrics = folder / "metrics.jsonl"
        files.shorten(metrics, end_before(metrics, 3))
        for step in (3, 4):
            files.append_line(folder / "metrics.jsonl", self.line(step))

    def check(self, folder: Path) -> None:
        lines = (folder / "metrics.jsonl").read_text("utf-8", errors="replace").splitlines(True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        assert whole == [self.line(step) for step in range(len(whole))] and len(whole) >= 3
        self.operate(folder)
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [self.line(step) for step in range(5)]


class RunFolder(Saving):
    """The first files of a run, up to its second step; it has no checkpoint yet."""

    def config(self, folder: Path):
        argv = [f"--output={folder / 'run'}", "--resume=auto", "--steps=3", "--eval-samples=0"]
        return parse_train_config(argv)

    def prepare(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def operate(self, folder: Path) -> None:
        with RunLog(self.config(folder)) as log:
            log.create()
            log.start(0)
            for step in range(2):
                log.step(step, {"loss": 0.5 + step})

    def check(self, folder: Path) -> None:
        self.operate(folder)  # whatever there is, --resume auto begins again
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1]
        shutil.rmtree(folder / "run")


SAVINGS = {
    "checkpoints": Checkpoints,
    "a folder replaced": Folder,
    "a new folder": NewFolder,
    "evaluation.json": Json,
    "config.yaml": Config,
    "metrics.jsonl": Lines,
    "a run folder": RunFolder,
}
