"""Running a script in a process of its own, against this checkout."""

import os
import subprocess
import sys
from pathlib import Path


def run_script(
    path: Path, text: str, timeout: float = 50, **environment: str
) -> subprocess.CompletedProcess:
    path.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{text}")
    command, env = [sys.executable, str(path)], {**os.environ, **environment}
    return subprocess.run(
        command,
        cwd=path.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
