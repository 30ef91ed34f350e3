"""Checksums: whether files are still what was written, and records that show their own damage.

A record is a JSON object whose last entry is the SHA-256 of its text without that entry. Files are
compared by size and CRC-32, which finds every changed byte and, of other damage, all but one case
in 4 billion. Both find damage, and not what somebody has forged.
"""

import errno
import hashlib
import json
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError, shortened
from .file_kinds import is_no_file

SEAL = "checksum"
"""The last entry of a record."""
BLOCK = 2**26
"""Bytes that are read at a time."""
CHECKSUMS = "checksums.json"
"""The record of a folder's files, where the folder has no other."""

DAMAGE = (errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
"""What the system says of a file that is there but cannot be read back, or is no file any more."""

FileChecks = dict[str, dict[str, Any]]
"""File name → `{"bytes": …, "crc32": …}`."""


# --- files --------------------------------------------------------------------------------------


def checksum(path: Path) -> dict[str, Any]:
    """Return size and checksum of a file, as `{"bytes": …, "crc32": "8 hex digits"}`."""
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def checksums(folder: Path) -> FileChecks:
    """Return size and checksum of each file in `folder` and below, but for CHECKSUMS."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(name): checksum(folder / name) for name in names if str(name) != CHECKSUMS}


def finding(path: Path, expected: Mapping[str, Any]) -> str:
    """Say what is wrong with a file of which `expected` was written; "" for nothing."""
    try:
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{path.name} has {size} bytes instead of {expected['bytes']}"
        return "" if checksum(path) == expected else f"{path.name} is not what was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        raise_unless_damaged(path, error)
        return f"{path.name}: {error.strerror}"


def raise_unless_damaged(path: Path, error: OSError) -> None:
    """Raise UserError for a file that cannot be read at this moment, which may be whole."""
    if error.errno not in DAMAGE:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check its permissions and the disk or "
            "network that it is on, then try again."
        ) from error


def is_file_checks(value: object) -> bool:
    """Return whether a value that was read has the form of FileChecks, with plain names."""
    return isinstance(value, dict) and all(
        isinstance(check, dict)
        and check.keys() == {"bytes", "crc32"}
        and type(check["bytes"]) is int
        and isinstance(check["crc32"], str)
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name, check in value.items()
    )


# --- records ------------------------------------------------------------------------------------


def sealed(record: Mapping[str, Any]) -> str:
    """Return the text of a record: JSON, with its checksum as the last entry."""
    digest = hashlib.sha256(json.dumps(record, indent=1).encode()).hexdigest()
    return json.dumps({**record, SEAL: digest}, indent=1)


def read_sealed(path: Path, earlier: Collection[str] = ()) -> dict[str, Any]:
    """Read a record, and leave its checksum out.

    earlier: the entries of such records before they had a checksum; one of these entries alone
        needs none.

    Raises ValueError, which begins with the file's name, for a file that is missing or damaged.
    """
    if is_no_file(path):
        raise ValueError(f"{path.name} is no file")
    try:
        text = path.read_bytes().decode()
        record = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except OSError as error:
        raise_unless_damaged(path, error)
        raise ValueError(f"{path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({shortened(error)})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} is no JSON object")
    if SEAL in record:
        rest = {name: value for name, value in record.items() if name != SEAL}
        # Also what another text with the same meaning would be is not what was written.
        if text != sealed(rest):
            raise ValueError(f"{path.name} is not what was written")
        return rest
    if not record or not record.keys() <= set(earlier):
        raise ValueError(f"{path.name} has no checksum")
    return record


# --- folders ------------------------------------------------------------------------------------


def seal_folder(folder: Path) -> None:
    """Write the record of all files of a folder into it."""
    (folder / CHECKSUMS).write_text(sealed({"files": checksums(folder)}))


def folder_finding(folder: Path, unsealed: bool = False) -> str:
    """Say what is wrong with a folder that `seal_folder` has been called for; "" for nothing.

    unsealed: whether one without the record is taken, as earlier versions wrote them.
    """
    if unsealed and not (folder / CHECKSUMS).exists():
        return ""
    try:
        expected = read_sealed(folder / CHECKSUMS).get("files")
    except ValueError as error:
        return str(error)
    return files_finding(folder, expected)


def files_finding(folder: Path, expected: object) -> str:
    """Say what is wrong with the files of a folder, of which `expected` were written."""
    if not is_file_checks(expected):
        return "its record names no files"
    for name, check in expected.items():
        if found := finding(folder / name, check):
            return found
    return ""
