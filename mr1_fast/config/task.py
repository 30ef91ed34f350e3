"""Settings of the task: what the model is asked, and where the questions come from."""

from dataclasses import dataclass, field
from typing import Literal

R1V_SUFFIX = (
    "Output the thinking process in <think> </think> and final answer (number) in "
    "<answer> </answer> tags."
)
"""What R1-V appends to every problem, in training and in evaluation."""

TaskName = Literal["counting", "geometry", "figures", "arithmetic", "free"]
"""The tasks by name, which `TASKS` of mr1_fast.tasks has."""
Judging = Literal["strict", "r1v"]
"""The judges by name: the strict one, and R1-V's rules."""


@dataclass
class TaskConfig:
    """What the model is asked, and where the questions come from."""

    task: TaskName = "counting"
    """The task, which decides which items are drawn: counting, geometry or figures (area and
    perimeter), which show images, or arithmetic, which is text alone; free, which draws none, is
    anything whose answers can be verified."""
    data: str = "drawn"
    """Where items come from: `drawn` makes them; otherwise the name of a hub data set, a folder, or
    a parquet, arrow, json, jsonl or csv file (docs/data.md shows the layouts)."""
    data_split: str | None = None
    """Name of the split in --data that is trained on, such as testmini; by default train."""
    data_config: str | None = None
    """Configuration of a data set that has several, such as Accounting of MMMU."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the data by what they hold (images, problem, solution, thinking), where they have
    names that are not recognised, for example '{"problem": "query"}'."""
    image_root: str | None = None
    """Folder from which relative image paths in the data start, and which no path may leave; for
    the test sets superclevr200 and geoqa, the folder that holds R1-V's list and the images."""
    allow_urls: bool = False
    """Download images that the data names by http and https addresses, each at most 20 MiB and for
    60 s, and keep them in the cache. The data then decides which addresses this machine asks for,
    also in its own network: only for data that is trusted this far."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What happens to rows that cannot be used, which are found before the first step: stop, or
    skip them."""
    system_prompt: str | None = None
    """System message of every prompt; by default that of the model's chat template."""
    prompt_template: str | None = None
    """Jinja template of the user's text, with the columns of the row, for example
    '{{ problem }} Choose from {{ options }}.'; by default the problem and --prompt-suffix."""
    prompt_suffix: str = R1V_SUFFIX
    """What follows the problem, after a space; by default R1-V's words."""
    judge: Judging = "strict"
    """Who judges answers: the strict judge, which reads all of the answer tag, or R1-V's rules, for
    comparison with published figures."""
    difficulty: int = 1
    """Difficulty of drawn items, from 1 (the easiest) upwards."""
