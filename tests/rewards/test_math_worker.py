"""The process in which math-verify reads model output: what it imports, refuses and outlives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..data.scripts import run_script

FOLDER = Path(__file__).parents[2] / "mr1_fast" / "rewards"
"""The worker runs as a file, without the package around it."""


def test_the_worker_imports_no_torch_and_its_hook_stops_commands(tmp_path):
    script = f"""
sys.path.insert(0, {str(FOLDER)!r})
import math_worker
math_worker._warm_up()
print([name for name in ("torch", "transformers") if name in sys.modules])
sys.addaudithook(math_worker._refuse)
import os
for act in (lambda: os.system("touch {tmp_path}/a"), lambda: open("{tmp_path}/b", "w"), os.fork):
    try:
        print(act())
    except PermissionError:
        print("refused")
"""
    done = run_script(tmp_path / "hook.py", script)
    assert done.stdout.split() == ["[]", "refused", "refused", "refused"], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hook.py"]


@pytest.mark.parametrize(("peak_kib", "forks"), [("math_worker.PEAK_KIB", 1), (0, 7)])
def test_a_child_is_replaced_once_it_has_grown_and_not_for_what_it_says(peak_kib, forks):
    requests = [
        ["$(a last b$", None, 20],
        ["$(last$", None, 20],
        ["3", "3", 20],
        ["3", "4", 20],
        ["4", None, 20],
    ]
    script = f"""
import os
import math_worker
math_worker.PEAK_KIB = {peak_kib}
forks, stdout = [], os.dup(1)
os.register_at_fork(after_in_parent=lambda: forks.append(1))
math_worker.main()
os.write(stdout, str(len(forks)).encode())
"""
    text = "".join(json.dumps(request) + "\n" for request in [*requests, ["", None, 20]])
    done = subprocess.run(
        [sys.executable, "-c", script], input=text, cwd=FOLDER, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.split("\n") == [
        '"ready"',
        '"(a last b"',
        '"(last"',
        "true",
        "false",
        '"4"',
        "null",
        str(forks),
    ]
