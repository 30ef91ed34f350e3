"""Merges an adapter into its 16-bit model, layer by layer: `python -m mr1_fast.merge`."""

from ..command_line import start
from ..errors import exit_on_user_error
from .settings import parse

if __name__ == "__main__":
    config = start(parse)

    from .command import merge_adapter

    exit_on_user_error(lambda: merge_adapter(config))
