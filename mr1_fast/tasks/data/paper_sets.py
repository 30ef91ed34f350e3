"""The paper's two test sets, which are known by name."""

import os
from pathlib import Path

from ...errors import UserError

TEST_SETS = {
    "superclevr200": "superclevr_test200_counting_problems.jsonl",
    "geoqa": "geoqa_test_prompts.jsonl",
}
"""R1-V's file that lists a test set, by the set's name."""
LISTS = "https://github.com/StarsfieldAI/R1-V, src/eval/prompts"
"""Where those files are published. They are small, but they are not ours to redistribute."""
ARCHIVES = {
    "superclevr_test200_counting_problems.jsonl": "images",
    "geoqa_test_prompts.jsonl": "Geo170K",
}
"""The first folder of the image paths in a list, by the list's file name.

SuperCLEVR's images.zip unpacks to the first, and R1-V unpacks Geo170K's archive in the second. The
setting image_root may be the folder that holds it, or the folder itself under any name.
"""


def find_list(name: str, image_root: str | None) -> str:
    """Return the path of a test set's list, in `image_root` or in its folder `prompts`.

    A clone of R1-V has such a folder. Raises UserError if the list is missing.
    """
    file_name = TEST_SETS[name]
    if image_root is None:
        raise UserError(
            f"data {name} needs image_root: the folder with {file_name} and the images it names."
        )
    root = Path(os.path.expanduser(image_root))
    for path in (root / file_name, root / "prompts" / file_name):
        if path.is_file():
            return str(path)
    raise UserError(
        f"{root / file_name} is missing: put R1-V's list of {name} there (from {LISTS})."
    )
