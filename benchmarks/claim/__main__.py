"""From cells to pages: collect what experiments have found, and write what the pages say of it.

    python -m benchmarks.claim collect experiments/tiny experiments/tiny_long
    python -m benchmarks.claim write
    python -m benchmarks.claim show transfer-comparisons power

`collect` merges the finished cells of experiments into docs/experiment/cells.json. `write` makes
again, from that file alone, all blocks between `<!-- claim: NAME -->` and `<!-- /claim -->` in
README.md and docs/, and the figures beside the file. `show` prints blocks; without names, those
there are.
"""

import argparse
import sys
from pathlib import Path

from mr1_fast.command_line import begin
from mr1_fast.errors import UserError, exit_on_user_error

ROOT = Path(__file__).parents[2]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("collect", help="merge the finished cells of experiments")
    add.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    add.add_argument(
        "--replace", action="store_true", help="let what differs replace what is there"
    )
    write = commands.add_parser("write", help="make again all blocks of the pages, and the figures")
    write.add_argument("--root", type=Path, default=ROOT, help="the repository")
    show = commands.add_parser("show", help="print blocks")
    show.add_argument("names", nargs="*", metavar="NAME")
    for command in (add, write, show):
        command.add_argument(
            "--cells", type=Path, help="another file than docs/experiment/cells.json"
        )
    arguments = parser.parse_args(argv)

    # These import torch, which a wrong word need not wait for.
    from .archive import CELLS

    path = arguments.cells or (getattr(arguments, "root", ROOT) / CELLS)
    if arguments.command == "collect":
        _collect(arguments.folders, path, arguments.replace)
    elif arguments.command == "write":
        _write(arguments.root, path)
    else:
        _show(arguments.names, path)


def _collect(folders: list[Path], path: Path, replace: bool) -> None:
    from .archive import collect, read_archive, write_archive

    archive = read_archive(path) if path.exists() else {}
    for folder in folders:
        print(collect(archive, folder, replace))
    write_archive(path, archive)


def _write(root: Path, path: Path) -> None:
    from .archive import read_archive
    from .blocks import blocks
    from .figures import write_figures
    from .pages import fill

    archive = read_archive(path)
    for changed in fill(root, blocks(archive)):
        print(f"{changed} has changed")
    for figure in write_figures(archive, path.parent):
        print(figure)


def _show(names: list[str], path: Path) -> None:
    from .archive import read_archive
    from .blocks import blocks

    made = blocks(read_archive(path))
    if unknown := [name for name in names if name not in made]:
        raise UserError(
            f"there is no block {unknown[0]!r}: choose one that `show` without a name lists."
        )
    print("\n\n".join(made[name]() for name in names) if names else "\n".join(made))


if __name__ == "__main__":
    begin()
    exit_on_user_error(lambda: main(sys.argv[1:]))
