"""Checking all rows: what is found, what is remembered, and what becomes of bad rows."""

import os

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data.check import BATCH, BadRow, RowMemory, check_rows, settle_bad_rows
from mr1_fast.tasks.data.loaded import LoadedExamples

from ...data.pictures import ROW, picture


def examples(count, limit=None, **columns):
    rows = [{"problem": "?", "solution": str(index), **columns} for index in range(count)]
    return LoadedExamples(rows, "rows", 0, limit)


def refuse(*solutions):
    """A check that refuses some solutions, and the list of those that it has seen."""
    seen = []

    def check(example):
        seen.append(example.solution)
        if example.solution in solutions:
            raise UserError(f"{example.name} is refused.")

    return check, seen


@pytest.fixture
def memory(tmp_path):
    return RowMemory(tmp_path / "cache" / "rows.txt")


def test_every_bad_row_is_found_and_named(memory):
    check, seen = refuse("3", "7")
    bad = check_rows(examples(BATCH + 20), check, memory)
    assert [(row.index, row.fault) for row in bad] == [
        (3, "row 4 of rows is refused."),
        (7, "row 8 of rows is refused."),
    ]
    assert sorted(seen, key=int) == [str(index) for index in range(BATCH + 20)]


def test_a_row_that_cannot_be_read_is_bad(memory, tmp_path):
    picture(1).save(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    rows = [ROW, ROW | {"image": "cut.png"}, ROW | {"image": "gone.png"}, {"problem": ["?"]}]
    source = LoadedExamples(rows, "rows", 0, image_root=tmp_path)
    bad = check_rows(source, lambda example: None, memory)
    assert [row.index for row in bad] == [1, 2, 3]
    assert all(f"row {row.index + 1} of rows" in row.fault for row in bad)


def test_no_more_rows_are_checked_than_are_wanted(memory):
    check, seen = refuse("0", "2")
    source = examples(50)
    bad = check_rows(source, check, memory, count=4)
    assert [row.index for row in bad] == [0, 2]
    assert sorted(map(int, seen)) == [0, 1, 2, 3, 4, 5]  # two more for the two bad ones
    check, seen = refuse()
    check_rows(examples(50, limit=3), check, memory)
    assert sorted(map(int, seen)) == [0, 2]  # row 1 was good before


def test_what_was_good_is_not_checked_again_until_it_changes(memory, tmp_path):
    for name in ("1.png", "2.png"):
        picture(1).save(tmp_path / name)
    rows = [ROW, ROW | {"image": "2.png", "solution": "2"}, ROW | {"solution": "3"}]

    def seen_now():
        check, seen = refuse("3")
        check_rows(LoadedExamples(rows, "rows", 0, image_root=tmp_path), check, memory)
        return sorted(seen)

    assert seen_now() == ["1", "2", "3"]
    assert seen_now() == ["3"]  # what is bad is looked at again
    os.utime(tmp_path / "2.png", ns=(1, 1))
    assert seen_now() == ["2", "3"]
    rows[0] = ROW | {"problem": "Another?"}
    assert seen_now() == ["1", "3"]
    memory.path.write_bytes(b"\xff\x00 damaged")
    assert seen_now() == ["1", "2", "3"]


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    check, seen = refuse()
    check_rows(examples(3), check, RowMemory(tmp_path / "file" / "rows.txt"))
    assert len(seen) == 3


def settle(source, faulty, tmp_path, skip):
    check, _ = refuse(*faulty)
    bad = check_rows(source, check, RowMemory(tmp_path / "rows.txt"))
    said = []
    settle_bad_rows(source, bad, skip, tmp_path / "bad.txt", said.append)
    return said


def test_bad_rows_stop_a_run_with_one_sentence(tmp_path):
    with pytest.raises(UserError) as raised:
        settle(examples(9), ["4"], tmp_path, skip=False)
    assert str(raised.value) == (
        "1 row of rows cannot be used: row 5 of rows is refused. Mend the data, or leave such rows "
        "out with --bad-rows skip."
    )
    assert not (tmp_path / "bad.txt").exists()


def test_bad_rows_may_be_left_out(tmp_path):
    source = examples(9)
    [said] = settle(source, ["4", "0"], tmp_path, skip=True)
    assert said.startswith("left out 2 rows of rows: row 1 of rows is refused. row 5 of rows")
    assert [item.solution for item in source.all(99)] == list("1235678")
    assert settle(examples(3), [], tmp_path, skip=True) == []


def test_many_faults_are_all_in_a_file(tmp_path):
    sentence = rf"^5 rows .* row 2 of rows is refused. All are in {tmp_path}/bad.txt. Mend"
    with pytest.raises(UserError, match=sentence):
        settle(examples(9), list("12345"), tmp_path, skip=False)
    assert len((tmp_path / "bad.txt").read_text().splitlines()) == 5


def test_no_row_at_all_is_an_error_in_any_case(tmp_path):
    with pytest.raises(UserError, match="no row of rows can be used: row 1 of rows is refused"):
        settle(examples(2), ["0", "1"], tmp_path, skip=True)


def test_what_a_message_shows_of_bad_rows_is_short(tmp_path):
    for count in (1, 2, 9):
        bad = [
            BadRow(index, f"row {index + 1} has {'a fault, ' * 80}: mend it.")
            for index in range(count)
        ]
        with pytest.raises(UserError, match=r"row 1 has .* mend it\..*--bad-rows skip") as raised:
            settle_bad_rows(examples(20), bad, False, tmp_path / "bad.txt", print)
        assert len(str(raised.value)) <= 400 + 100 + len(str(tmp_path))
        assert ("All are in" in str(raised.value)) == (count > 1)
    assert len((tmp_path / "bad.txt").read_text().splitlines()) == 9
