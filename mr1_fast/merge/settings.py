"""The settings of `python -m mr1_fast.merge`."""

from dataclasses import dataclass
from pathlib import Path

from ..command_line import parse_settings
from ..config.bounds import check_values
from ..errors import UserError, shortened

PROGRAM = "python -m mr1_fast.merge"


@dataclass
class MergeConfig:
    """Merge a LoRA adapter into its 16-bit model, which any software then loads without PEFT. Call
    it as `python -m mr1_fast.merge ADAPTER --output FOLDER`."""

    adapter: str | None = None
    """Folder of the adapter, or final/ of a run that left one; its name may stand first, without
    the flag."""
    output: str | None = None
    """Folder of the merged model, which must be new."""
    base: str | None = None
    """The 16-bit model, a local folder or a name on the Hugging Face hub; by default the one that
    the adapter names."""

    def check(self) -> None:
        """Raise UserError for values that cannot be used."""
        check_values(self)
        if self.adapter is None:
            raise UserError(
                f"no adapter is named: pass its folder, as in `{PROGRAM} runs/NAME/final`."
            )
        if self.output is None:
            raise UserError("output is not given: name a new folder with --output.")
        if Path(self.output).exists():
            raise UserError(
                f"output {shortened(self.output, 200)} exists already: name a new folder."
            )


def parse(argv: list[str]) -> MergeConfig:
    """Read the settings from the words of a command line; raises UserError for a bad one."""
    if argv and not argv[0].startswith("-"):
        argv = ["--adapter", *argv]
    return parse_settings(MergeConfig, argv, PROGRAM)
