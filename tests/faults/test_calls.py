"""The layer itself: it sees every byte that the libraries of the package write.

What C's own buffers write, as numpy.save does, is not seen; the package writes nothing by them.
"""

import ctypes
import errno
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from tests.data.faults import WRITES, Call, Fault, forked, needs_gcc
from tests.data.gang import prepared

pytestmark = needs_gcc


def write_all(folder: Path) -> None:
    """Write by each of the libraries that the package writes with."""
    tensor = torch.arange(50_000)
    save_file({"x": tensor}, folder / "rust.safetensors")
    torch.save(tensor, folder / "cpp.pt")
    Image.new("RGB", (300, 200), "red").save(folder / "image.png")
    (folder / "text.json").write_text(json.dumps(list(range(5000))))
    with (folder / "buffered.jsonl").open("a") as file:
        file.writelines(f"{number}\n" for number in range(20_000))


def see_all(scratch: Path) -> tuple[list[Call], dict[str, int]]:
    folder = scratch / "watched"
    folder.mkdir()
    (scratch / "watched-not").mkdir()

    def operate() -> None:
        write_all(folder)
        write_all(scratch / "watched-not")

    outcome = forked(operate, folder)
    assert outcome.status == 0, outcome.said
    return outcome.calls, {f"/{path.name}": path.stat().st_size for path in folder.iterdir()}


def test_every_byte_is_seen_whoever_writes_it(tmp_path):
    calls, sizes = prepared(see_all, tmp_path)
    seen = Counter()
    for call in calls:
        # safetensors writes a hidden file, and gives it the name then.
        path = "/rust.safetensors" if call.path.startswith("/.tmp") else call.path
        seen[path] += call.size if call.kind == WRITES else 0
    assert len(sizes) == 5 and {name: seen[name] for name in sizes} == sizes
    assert not [name for name in seen if "not" in name]


def refuse_each(scratch: Path, numbers: list[int]) -> list[str]:
    def operate() -> None:
        save_file({"x": torch.zeros(9)}, scratch / "rust.safetensors")

    outcomes = [forked(operate, scratch, Fault(1, "fail", each, WRITES)) for each in numbers]
    return [outcome.said.strip().splitlines()[-1] for outcome in outcomes]


def test_a_library_in_rust_is_told_of_the_error(tmp_path):
    numbers = [errno.EIO, errno.ENOSPC, errno.EDQUOT]
    for number, said in zip(numbers, prepared(refuse_each, tmp_path, numbers), strict=True):
        assert f"os error {number}" in said


def look_at_clocks(scratch: Path) -> list[str]:
    def operate() -> None:
        before = time.time(), time.monotonic()
        ctypes.CDLL(None).faults_clock(*map(ctypes.c_long, (0, -86_400, 3600)))
        print(round(time.time() - before[0]), round(time.monotonic() - before[1]))

    return forked(operate, scratch).said.split()


def test_clocks_jump(tmp_path):
    real, monotonic = map(int, prepared(look_at_clocks, tmp_path))
    assert -86_400 <= real < -86_300 and 3600 <= monotonic < 3700


def end_at_second_write(scratch: Path) -> tuple[int, bytes]:
    def operate() -> None:
        file = os.open(scratch / "file", os.O_CREAT | os.O_WRONLY)
        for word in (b"first ", b"second"):
            os.write(file, word)

    outcome = forked(operate, scratch, Fault(2, "half, then signal", signal.SIGKILL, WRITES))
    return outcome.status, (scratch / "file").read_bytes()


def test_a_kill_in_the_middle_of_a_write_leaves_a_half(tmp_path):
    assert prepared(end_at_second_write, tmp_path) == (-signal.SIGKILL, b"first sec")
