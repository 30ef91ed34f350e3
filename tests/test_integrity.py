"""Records that show their own damage, and checksums of a folder's files."""

import json
import math
import os

import pytest

from mr1_fast.integrity import (
    CHECKSUMS,
    checksum,
    folder_finding,
    read_sealed,
    seal_folder,
    sealed,
)

RECORD = {"a": [1, 2.5, -0.0, 1e300, None, True], "β": {"": "\ud800 \x00"}, "long": 10**400}


def test_a_record_comes_back_as_it_was(tmp_path):
    (path := tmp_path / "a.json").write_text(sealed(RECORD))
    assert read_sealed(path) == RECORD and json.loads(path.read_text())["a"] == RECORD["a"]
    path.write_text(sealed({"nan": math.nan, "inf": -math.inf}))
    assert math.isnan(read_sealed(path)["nan"])
    path.write_text(sealed({}))
    assert read_sealed(path) == {}


@pytest.mark.parametrize("content", ["a pipe", "/dev/zero"])
def test_what_would_be_waited_for_is_no_record(content, tmp_path):
    path = tmp_path / "a.json"
    os.mkfifo(path) if content == "a pipe" else path.symlink_to(content)
    with pytest.raises(ValueError, match=r"^a\.json is no file$"):
        read_sealed(path)


def test_each_other_text_is_told(tmp_path):
    path, text = tmp_path / "a.json", sealed({"a": 1.0, "b": "1.0"}).encode()
    for at in range(len(text)):
        for bit in range(8):
            path.write_bytes(text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :])
            with pytest.raises(ValueError, match=r"^a\.json "):
                read_sealed(path, ("a", "b"))
        path.write_bytes(text[:at])
        with pytest.raises(ValueError, match=r"^a\.json "):
            read_sealed(path, ("a", "b"))
    for other in (text.replace(b"1.0", b"1.00"), text + b"\n", b" " + text, b"\xef\xbb\xbf" + text):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"^a\.json "):
            read_sealed(path)


def test_only_records_of_earlier_versions_need_no_checksum(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_sealed(path, ("a", "b")) == {"a": 1}
    with pytest.raises(ValueError, match=r"^a\.json has no checksum$"):
        read_sealed(path)
    path.write_text('{"a": 1, "chfcksum": "0"}')
    with pytest.raises(ValueError, match=r"^a\.json has no checksum$"):
        read_sealed(path, ("a", "b"))


def test_a_folder_says_what_is_wrong_with_it(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text(name)
    seal_folder(tmp_path)
    assert folder_finding(tmp_path) == ""
    assert checksum(tmp_path / "a") == {"bytes": 1, "crc32": "e8b7be43"}
    (tmp_path / "deep" / "b").write_text("deep/c")
    assert folder_finding(tmp_path) == "b is not what was written"
    (tmp_path / "deep" / "b").write_text("deep")
    assert folder_finding(tmp_path) == "b has 4 bytes instead of 6"
    (tmp_path / "deep" / "b").unlink()
    assert folder_finding(tmp_path) == "b is missing"
    (tmp_path / CHECKSUMS).write_text("[")
    assert folder_finding(tmp_path).startswith("checksums.json is no JSON (")
    (tmp_path / CHECKSUMS).write_text(sealed({"files": {"../a": {"bytes": 1, "crc32": ""}}}))
    assert folder_finding(tmp_path) == "its record names no files"
    (tmp_path / CHECKSUMS).unlink()
    assert folder_finding(tmp_path) == "checksums.json is missing"
