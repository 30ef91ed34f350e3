"""A number for the sources in csrc/, which tells a library of other sources from one of these.

setup.py runs this file by itself and compiles the number into each library; native.py compares.
"""

import hashlib
from pathlib import Path


def csrc_digest(csrc: Path) -> int:
    """Hash the names and the contents of the sources to 64 bits."""
    total = hashlib.sha256()
    for path in sorted(csrc.iterdir()):
        if path.suffix in (".h", ".cpp", ".cu"):
            total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return int.from_bytes(total.digest()[:8], "big")
