"""The check of loaded rows before the first step, with the prompts and the judge of a run."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields

from .config import TaskConfig, cache_folder
from .errors import UserError
from .model.prompt import PromptWriter
from .rewards.answers import kind_of
from .start import load_writer
from .tasks.data import DrawnExamples, LoadedExamples
from .tasks.data.check import RowMemory, check_rows, settle_bad_rows
from .types import Example
from .version import __version__

LONGEST_THINKING = 2**18
"""The most characters of a worked solution; megabytes would take minutes to split into tokens."""
LIMITS = ("max_prompt_tokens", "max_pixels", "shrink_images")
"""The settings of a model on which it depends whether a prompt can be encoded."""


def check_data(
    source: DrawnExamples | LoadedExamples | None,
    config: TaskConfig,
    count: int | None = None,
    say: Callable[[str], None] = print,
    needs_thinking: bool = False,
) -> None:
    """Check every row of loaded data, or as many as give `count` good ones, for use with a model.

    `config` has the settings of the task and of the model, whose weights are not loaded. A row must
    load, its images must decode, its prompt must keep the limits of the settings, and its solution
    must be one that the judge can read; with `needs_thinking`, it must also have a worked solution.
    With `--bad-rows skip`, the others are left out of `source`; otherwise UserError is raised,
    which names them. Drawn examples need no check.
    """
    if not isinstance(source, LoadedExamples):
        return
    writer = load_writer(config)

    def check(example: Example) -> None:
        writer.length(example)
        if config.judge == "strict":
            check_solution(example)
        if needs_thinking and not example.thinking:
            raise UserError(f"{example.name} has no 'thinking': fill it in or leave the row out.")
        if needs_thinking and len(example.thinking) > LONGEST_THINKING:
            raise UserError(
                f"the thinking of {example.name} has {len(example.thinking):,} characters, more "
                f"than {LONGEST_THINKING:,}: shorten it or leave the row out."
            )

    folder, key = cache_folder() / "rows", _settings_digest(writer, config, needs_thinking)
    bad = check_rows(source, check, RowMemory(folder / f"{key}.txt"), count)
    report = folder / f"{key}-bad.txt"
    settle_bad_rows(source, bad, config.bad_rows == "skip", report, say)


def check_solution(example: Example) -> None:
    """Raise UserError for a solution that no answer can equal by the strict judge."""
    kind = kind_of(example.solution)
    if kind in ("empty", "too long"):
        raise UserError(
            f"the solution of {example.name} is {kind}, so no answer can be right: give the bare "
            "answer."
        )


def _settings_digest(writer: PromptWriter, config: TaskConfig, needs_thinking: bool) -> str:
    """Return what identifies all that a row's verdict depends on beside the row itself."""
    settings = {f.name: getattr(config, f.name) for f in fields(TaskConfig)}
    settings |= {name: getattr(config, name) for name in LIMITS}
    processor = writer.processor
    model = [
        len(processor.tokenizer),
        processor.chat_template,
        processor.image_processor and processor.image_processor.to_json_string(),
        config.model,
    ]
    text = json.dumps([__version__, settings, model, needs_thinking], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
