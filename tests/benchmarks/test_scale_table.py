"""What is said of more cards, on paper, is what the script prints."""

from pathlib import Path

import pytest
import scale_table
from scale_table import A100, RTX_4090, Seconds, speed, waited

from mr1_fast.plan.wires import Wires

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_waiting_by_hand():
    seconds, wires = Seconds(1.0, 2.0, 3.0), Wires(rollout=10, reference=30, update=20)
    assert waited("none", Wires(update=20), seconds, 10.0) == 2.0
    assert waited("full", wires, seconds, 10.0) == 1.0 + (3.0 - 2.0)
    assert speed(RTX_4090, 8) == speed(A100, 64) == 20e9 and speed(A100, 8) == 200e9


@pytest.mark.slow
def test_the_page_has_what_the_script_prints(capsys):
    scale_table.main()
    text = PAGE.read_text(encoding="utf-8")
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in text
