"""Merges an adapter into its 16-bit model, layer by layer: `python -m mr1_fast.merge`."""

from ..command_line import start
from ..errors import exit_on_user_error
from ..torchrun import leave_to_first
from .settings import parse

if __name__ == "__main__":
    leave_to_first()
    config = start(parse)

    from .command import merge_adapter

    exit_on_user_error(lambda: merge_adapter(config))
