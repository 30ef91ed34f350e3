"""Reads the settings of a command from flags and YAML files into a dataclass, and explains them.

A value is looked up in this order: command-line flag, YAML file (`--config`), the profile's
defaults (of the task's preset, the model and the algorithm), the default of the dataclass. The
text of a flag and a value of a YAML file are converted in the same way, by the field's type.

Nothing here imports torch. A command reads its settings with `start` before it imports what is
slow to load, so that help and a wrong setting are answered at once.
"""

import argparse
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar, get_type_hints

from . import torchrun
from .config import TrainConfig
from .config.bounds import check_value
from .config.objective import ALGORITHMS
from .config.train import check_sharding
from .errors import UserError, begin_command, exit_on_user_error, shortened
from .identity import identity, require_identity
from .own_python import require_known_python
from .profiles import profile_defaults
from .resuming import AUTO, AutoResumed, finished, has_checkpoint, settings_file, started_before
from .setting_values import Unfit, convert, described, metavar, shown
from .settings_file import Unusable, read_yaml_file
from .settings_help import Group, groups, help_texts

PRECEDENCE = (
    "A flag counts more than a YAML file, and both count more than the defaults below, which hold "
    "for the other arguments of this call. A switch (true or false) needs no value; a list or "
    "a mapping is written as YAML."
)
HELP = "Show this help, with the defaults that hold for the other arguments, and exit."
CONFIG = (
    "YAML file with any of the settings below, whose names are spelled with underscores there; "
    "may be repeated, and the last file counts most."
)

RENAMED = {"gradient_checkpointing": ("recompute", {True: "all", False: "none"})}
"""Settings of earlier versions: those in their place, and today's values by the earlier ones.

Files may have them, since a run folder of an earlier version has them in its config.yaml."""

EARLIER = {"output", "preset", "beta", "beta_min", "beta_max", "explore_fraction", "beta_shape"}
"""Settings that the config.yaml of an earlier run has, which named all of them."""


class Settings(Protocol):
    """A dataclass whose fields are settings, each with its help text as a string below it."""

    def check(self) -> None:
        """Raise UserError for values that cannot be used."""


Config = TypeVar("Config", bound=Settings)
Profile = Callable[[Any], dict[str, Any]]
"""Defaults that depend on other settings, which it gets as an instance of the dataclass."""


def start(parse: Callable[[list[str]], Config]) -> Config:
    """Begin a command: prepare its process, and return the settings of its command line.

    `parse` gets the words of the command line. A UserError becomes one line on stderr and exit
    status 2; Ctrl-C while it imports ends the process with a line. Call it before torch is
    imported:

        if __name__ == "__main__":
            config = start(parse_train_config)
    """
    begin()
    return exit_on_user_error(lambda: parse(sys.argv[1:]))


def begin() -> None:
    """Prepare the process of a command, and what libraries read from its environment."""
    begin_command()
    prepare_process()


def prepare_process() -> None:
    """Set what libraries read from the environment once, when torch is imported.

    torch's OpenMP threads spin for milliseconds while they wait, which makes a run on a CPU eight
    times slower if another process is busy. A short spin costs a tenth on an idle machine. What
    the user has set stays. Of several processes, the first alone shows progress and warnings.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if not torchrun.is_first():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")


def parse_train_config(argv: list[str], processes: int | None = None) -> TrainConfig:
    """The settings of a training run from the words of a command line; UserError for a bad one.

    `--resume FOLDER` begins with the settings in FOLDER/config.yaml, and writes to FOLDER; without
    a checkpoint there, the run begins again, and resume is then `auto`. `--resume auto` is that of
    the folder that --output names, if it has a checkpoint; where the run there is finished, say so
    and exit. The settings must suit the number of `processes` that train together: by default, all
    that torchrun has started. Python that only the folder's settings name is not run, unless this
    user has run it before.
    """
    processes = processes or torchrun.size()
    parser = SettingsParser(TrainConfig, "python -m mr1_fast.train", profile_defaults)
    given = parser.read(argv)
    named = parser.named(given)
    resume = parser.unchecked(given).resume  # a file may have it as well as a flag
    is_auto = resume == AUTO
    if is_auto and not given.wants_help:
        resume = started_before(parser.unchecked(given).output)
        if resume is not None:
            given.flags["resume"] = resume
    if resume in (None, AUTO):
        if "algo" in given.flags:
            parser.check_algorithm(given)
    else:
        saved = str(settings_file(resume))
        given.files.insert(0, saved)
        given.flags |= {
            "output": resume,
            "resume": resume if has_checkpoint(Path(resume)) else AUTO,
        }
        found, begun = parser.unchecked(given), parser.unchecked(Given([saved], {}, False))
        require_identity(identity(found), identity(begun), Path(resume))
    config = parser.settle(given)
    if resume not in (None, AUTO):
        require_known_python(config, named, resume)
        if is_auto:
            config.resume = AutoResumed(resume)
    config.check_prompts(processes)
    if processes > 1:
        check_sharding(config)
    if is_auto and (words := finished(config)):
        if torchrun.is_first():
            print(words)
        sys.exit(0)
    return config


def parse_settings(
    cls: type[Config], argv: list[str], prog: str, profile: Profile | None = None
) -> Config:
    """A checked instance of the dataclass `cls` from the words of a command line.

    Raises UserError for a bad one; prints the help and exits where the words contain `--help`.
    `prog` is the command that messages and the help name.
    """
    parser = SettingsParser(cls, prog, profile)
    return parser.settle(parser.read(argv))


@dataclass
class Given:
    """What a command line says."""

    files: list[str]
    """Paths of YAML files; the last one counts most."""
    flags: dict[str, Any]
    """Value of each flag, by the name of its setting."""
    wants_help: bool
    """Whether `--help` is among the words."""


class SettingsParser(Generic[Config]):
    """Reads command lines whose flags are the fields of the dataclass `cls`."""

    def __init__(self, cls: type[Config], prog: str, profile: Profile | None = None):
        self.cls, self.prog, self.profile = cls, prog, profile
        self._read_files: dict[str, dict[str, Any]] = {}  # of one command line, by path
        self.kinds = get_type_hints(cls)
        self.words = _Words(
            prog=prog,
            usage="%(prog)s [--config FILE] [--SETTING VALUE …]",
            description=f"{inspect.getdoc(cls)} {PRECEDENCE}",
            formatter_class=partial(argparse.HelpFormatter, max_help_position=30),
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            add_help=False,
        )
        add = self.words.add_argument
        add("-h", "--help", action="store_true", default=False, help=HELP)
        add("--config", action="append", default=[], metavar="FILE", help=CONFIG)
        self.flags = {name: action for group in groups(cls) for name, action in self._add(group)}

    def _add(self, group: Group) -> Iterator[tuple[str, argparse.Action]]:
        """Add the flags of a group; yields each setting's name with its flag."""
        section = self.words.add_argument_group(group.title, group.about)
        for name in group.names:
            kind = self.kinds[name]
            bare = {"nargs": "?", "const": "true"} if kind is bool else {}
            flag = f"--{name.replace('_', '-')}"
            yield name, section.add_argument(flag, dest=name, metavar=metavar(kind), **bare)

    def read(self, argv: list[str]) -> Given:
        """Sort the words of a command line; UserError for one that is no flag of this command."""
        self._read_files.clear()
        words = [_with_dashes(word) for word in argv]
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            name, today = RENAMED.get(flag[2:].replace("-", "_"), ("", {}))
            if name in self.kinds:
                values = ", ".join(f"{new} for {shown(old)}" for old, new in today.items())
                raise UserError(f"{flag} is now --{name} ({values}): see {self.prog} --help.")
        found = vars(self.words.parse_args(words))
        files, wants_help = found.pop("config"), found.pop("help")
        flags = {name: self.converted(name, text) for name, text in found.items()}
        return Given(files, flags, wants_help)

    def settle(self, given: Given) -> Config:
        """The checked settings; where help is wanted, print it with them as defaults and exit."""
        config = self.unchecked(given)
        if given.wants_help:
            if torchrun.is_first():
                self.print_help(config)
            sys.exit(0)
        config.check()
        return config

    def named(self, given: Given) -> set[str]:
        """The names of all settings that a command line and its files give."""
        return {*given.flags, *(name for path in given.files for name in self._read_yaml(path))}

    def unchecked(self, given: Given) -> Config:
        """The settings, each of its type, which may not suit one another."""
        values: dict[str, Any] = {}
        for path in given.files:
            values |= self._read_yaml(path)
        values |= given.flags
        if self.profile is not None:
            values = self.profile(self.cls(**values)) | values
        return self.cls(**values)

    def check_algorithm(self, given: Given) -> None:
        """Raise UserError for another algorithm than that of a file which names all it consists of.

        A run's config.yaml is such a file: its settings would count more than those of --algo.
        """
        for path in given.files:
            values = self._read_yaml(path)
            algo = values.get("algo")
            if values.keys() >= ALGORITHMS["grpo"].keys() and algo != given.flags["algo"]:
                raise UserError(
                    f"algo is {given.flags['algo']}, but config {path} has all settings of {algo}: "
                    "leave --algo out, or start a run without that file."
                )

    def print_help(self, config: Config) -> None:
        """Print every flag with its help text, the values it may have, and that of `config`."""
        texts = help_texts(self.cls)
        for name, flag in self.flags.items():
            default = f"default: {shown(getattr(config, name))}"
            allowed = "; ".join(filter(None, (described(self.kinds[name]), default)))
            flag.help = f"{texts[name]} ({allowed})".replace("%", "%%")
        self.words.print_help()

    def _read_yaml(self, path: str) -> dict[str, Any]:
        """The settings in a YAML file, which is read once; UserError as of `_parse_yaml`."""
        if path not in self._read_files:
            self._read_files[path] = self._parse_yaml(path)
        return self._read_files[path]

    def _parse_yaml(self, path: str) -> dict[str, Any]:
        """The settings in a YAML file; UserError, with its path, where it holds anything else."""
        file = f"config {shortened(path, 200)}"
        try:
            values = read_yaml_file(path)
        except Unusable as error:
            raise UserError(f"{file} {error}") from error
        if not isinstance(values, dict):
            reason = "holds no settings: write a line such as `steps: 100` for each."
            raise UserError(f"{file} {reason}")
        settings: dict[str, Any] = {}
        if values.get("algo") == "grpo" and values.keys() >= EARLIER and "loss_type" not in values:
            # The config.yaml of an earlier version, whose GRPO had a constant β whatever this said.
            values = {name: value for name, value in values.items() if name != "beta_shape"}
        for name, value in values.items():
            if name in RENAMED:
                name, today = RENAMED[name]
                value = today[value] if isinstance(value, bool) else value
            if name not in self.kinds:
                reason = f"has {shortened(repr(name))}, which is no setting"
                raise UserError(f"{file} {reason}: see {self.prog} --help.")
            if name in settings:
                raise UserError(
                    f"{file} has {name} by an earlier name, too: leave one of them out."
                )
            settings[name] = self.converted(name, value)
        return settings

    def converted(self, name: str, value: Any) -> Any:
        """The text of a flag, or a value of a file, as one that the setting `name` may have."""
        try:
            value = convert(value, self.kinds[name])
        except Unfit as error:
            sentence = f"{name} is {error}: see {self.prog} --help."
            raise UserError(" ".join(sentence.split())) from error
        check_value(name, value)
        return value


class _Words(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{shortened(message, 200)}: see {self.prog} --help.")


def _with_dashes(word: str) -> str:
    """`--top_p=1` as `--top-p=1`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word
