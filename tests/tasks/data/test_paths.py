"""Image files by every form of path; nothing but regular files, none outside a fence."""

import os
import threading

import pytest

from mr1_fast.errors import UserError, shortened
from mr1_fast.tasks.data.paths import LARGEST_FILE, ImageFolder, open_file


def found(text, root, fenced=False):
    return ImageFolder(root, fenced).find(text)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "img").mkdir(parents=True)
    (folder / "img" / "a.png").touch()
    (folder / "img" / "a b%.png").touch()
    (tmp_path / "outside.png").touch()
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "img/a.png",
        "./img/a.png",
        "img/../img/a.png",
        "img\\a.png",
        ".\\img\\a.png",
        "{root}/img/a.png",
        "file://{root}/img/a.png",
        "FILE://{root}/img/a.png",
        "file:{root}/img/a.png",
        "file://localhost{root}/img/a.png",
        "file://img/a.png",  # not a right address, but qwen_vl_utils reads it
        "file:///{root}/img/../img/a.png",
    ],
)
@pytest.mark.parametrize("fenced", [False, True])
def test_forms_of_a_path(text, fenced, root):
    path = found(text.format(root=root), root, fenced)
    assert os.path.samefile(path, root / "img" / "a.png")


def test_percent_signs_are_decoded_in_addresses_alone(root):
    file = root / "img" / "a b%.png"
    assert found(f"file://{root}/img/a%20b%25.png", root) == file
    assert found("img/a b%.png", root) == file and found(f"file://{file}", root) == file
    assert found("img/a%20b%25.png", root) is None


def test_a_literal_backslash_comes_first(root):
    literal = root / "img\\a.png"
    literal.touch()
    assert found("img\\a.png", root) == literal


def test_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    assert found("~/img/a.png", root.parent) == root / "img" / "a.png"
    assert found("~/img/a.png", root.parent / "elsewhere", fenced=True) is None
    assert found("~nobody-of-this-name/a.png", root) is None


@pytest.mark.parametrize(
    "text", ["../outside.png", "img/../../outside.png", "{0}/outside.png", "file://{0}/outside.png"]
)
def test_the_fence(text, root):
    text = text.format(root.parent)
    assert found(text, root) and found(text, root, fenced=True) is None
    error = ImageFolder(root, fenced=True).error(text, "row 1 of d")
    assert "row 1 of d) is outside" in str(error) and "--image-root" in str(error)


def test_the_fence_holds_for_symbolic_links(root):
    (root / "file.png").symlink_to(root.parent / "outside.png")
    (root / "folder").symlink_to(root.parent)
    (root / "inside.png").symlink_to("img/a.png")
    (root / "loop").symlink_to("loop")
    for text in ("file.png", "folder/outside.png"):
        assert found(text, root) and found(text, root, fenced=True) is None
    assert found("inside.png", root, fenced=True) and found("loop", root, fenced=True) is None
    # A sibling whose name begins alike is outside; a root that is itself a link is no obstacle.
    (root.parent / "root2").mkdir()
    (root.parent / "root2" / "a.png").touch()
    assert found("../root2/a.png", root) and found("../root2/a.png", root, fenced=True) is None
    (root.parent / "link").symlink_to(root)
    assert found("img/a.png", root.parent / "link", fenced=True)


@pytest.mark.parametrize(
    "text", ["", "a\0.png", "file://%00", "\ud800.png", "x" * 256, "a/" * 2100, "9" * 10**6]
)
def test_paths_that_no_file_can_have(text, root):
    message = str(ImageFolder(root).error(text, "row 2 of d"))
    assert found(text, root) is None and len(message) < 400
    assert "row 2 of d" in message and message.isprintable()


def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    (tmp_path / "link.png").symlink_to(pipe)
    refused = []

    def try_all():
        for path in (pipe, tmp_path / "link.png", tmp_path, "/dev/zero", "/dev/stdin", "/dev/tty"):
            with pytest.raises(UserError, match=r"\(row 1 of d\) is not a regular file"):
                open_file(path, "row 1 of d")
            refused.append(path)

    # A pipe without a writer would block for ever.
    thread = threading.Thread(target=try_all, daemon=True)
    thread.start()
    thread.join(20)
    assert len(refused) == 6


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"cannot be opened \(No such file or directory\)"):
        open_file(tmp_path / "gone.png", "row 1 of d")


def test_a_file_that_fills_the_memory(tmp_path):
    """Pillow reads WebP files as a whole."""
    with open(tmp_path / "a.webp", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(UserError, match="has more than 512 MiB"):
        open_file(tmp_path / "a.webp", "row 1 of d")


def test_shortened_text_is_one_printable_line():
    assert shortened("a" * 80) == "a" * 80 and shortened("a" * 81) == "a" * 79 + "…"
    assert shortened("é\n\x1b[31m\0\u202e") == r"é\n\x1b[31m\x00\u202e"
