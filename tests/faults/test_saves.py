"""Whatever call of a save goes wrong, nothing is lost, and the next save works.

Each save runs in forks of one process, once for each call that it makes. The suite tries some of
the calls; the slow tests try all of them.
"""

import errno
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.data.faults import ALL, MAKES, WRITES, Fault, forked, needs_gcc
from tests.data.gang import prepared
from tests.data.savings import SAVINGS

pytestmark = needs_gcc

FAULTS = {
    "kill": Fault(how="signal", value=signal.SIGKILL),
    "kill in a write": Fault(how="half, then signal", value=signal.SIGKILL, kinds=WRITES),
    "SIGTERM": Fault(how="signal", value=signal.SIGTERM),
    "SIGINT": Fault(how="signal", value=signal.SIGINT),
    "full disk": Fault(how="fail", value=errno.ENOSPC, kinds=WRITES | MAKES, lasting=True),
    "quota": Fault(how="fail", value=errno.EDQUOT, kinds=WRITES, lasting=True),
    "EIO": Fault(how="fail", value=errno.EIO, kinds=ALL),
    "EIO for ever": Fault(how="fail", value=errno.EIO, kinds=ALL, lasting=True),
    "short write": Fault(how="short", kinds=WRITES),
    "EINTR": Fault(how="fail", value=errno.EINTR, kinds=WRITES),
}
STATUS = {
    "kill": {-signal.SIGKILL},
    "kill in a write": {-signal.SIGKILL},
    "SIGTERM": {143},
    "SIGINT": {130},
    "full disk": {0, 2},
    "quota": {2},
    "EIO": {0, 2},
    "EIO for ever": {0, 2},
    "short write": {0},
    "EINTR": {0},
}
"""How a process with the fault may end: some calls, as that of closing a folder, may well fail, and
an old checkpoint whose removal is refused stays until the next save."""


def try_calls(name: str, what: str, scratch: Path, every: int) -> dict[str, int]:
    """Try a fault at every n-th call of a save; returns how often it was tried, by exit status."""
    saving, fault = SAVINGS[name](), FAULTS[what]
    template, folder = scratch / "before", scratch / "folder"
    saving.prepare(template)

    def attempt(at: int):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        chosen = Fault(at, fault.how if at else "nothing", fault.value, fault.kinds, fault.lasting)
        return forked(lambda: saving.operate(folder), folder, chosen)

    whole = attempt(0)
    assert whole.status == 0, whole.said
    calls = [call for call in whole.calls if call.kind & fault.kinds]
    assert calls
    tried, wrong = Counter(), []
    for at in range(1 + sum(map(ord, what)) % every, len(calls) + 1, every):
        call = calls[at - 1]
        outcome = attempt(at)
        where = f"{what} at call {at} of {len(calls)}, {call.name} of {call.path}"
        try:
            assert outcome.status in STATUS[what], (outcome.status, outcome.said)
            assert "Traceback" not in outcome.said, outcome.said
            if outcome.status == 2:
                said = [line for line in outcome.said.splitlines() if line.startswith("error: ")]
                assert len(said) == 1 and re.search(r"[:,] .*\.$", said[0]), outcome.said
            saving.check(folder)
        except Exception as error:
            wrong.append(f"{where}: {type(error).__name__}: {str(error)[:600]}")
        tried[outcome.status] += 1
    assert not wrong, f"{len(wrong)} of {tried.total()}\n" + "\n".join(wrong)
    return dict(tried)


@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("name", SAVINGS)
def test_a_fault_at_some_calls(name, what, tmp_path):
    print(name, what, prepared(try_calls, name, what, tmp_path, 9))


@pytest.mark.thorough
@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("name", SAVINGS)
def test_a_fault_at_every_call(name, what, tmp_path):
    print(name, what, prepared(try_calls, name, what, tmp_path, 1))
