"""Marks, reaper and stale groups: nothing that carries a mark outlives its owner."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.workers.processes import (
    GROUP_VARIABLE,
    GroupMark,
    Reaper,
    kill_group,
    kill_stale_groups,
    marked_processes,
    start_ticks,
    this_machine,
)

LIMIT_S = 20.0

# An owner: marks itself as such, has a reaper, and starts a child, a grandchild in another session, and a stopped one.
OWNER = """
import os, subprocess, sys, time
from serve.workers.processes import GROUP_VARIABLE, GroupMark, Reaper
group, reaps, lease_s = sys.argv[1], sys.argv[2] == "reaps", float(sys.argv[3]) or None
mark = GroupMark.of_this_process(group)
reaper = Reaper(mark, lease_s) if reaps else None
os.environ[GROUP_VARIABLE] = mark.for_rank(0).to_text()
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
family = [sys.executable, "-S", "-c", f"import subprocess; subprocess.run({sleep!r}, start_new_session=True)"]
children = [subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL) for line in (sleep, family)]
os.kill(children[0].pid, 19)
while True:
    from serve.workers.processes import marked_processes
    if len(marked_processes(lambda other: other.group == group)) == 3:
        break
    time.sleep(0.01)
print(reaper.pid if reaper else 0, flush=True)
for word in sys.stdin:
    if word == "renew\\n":
        reaper.renew()
    elif word == "dismiss\\n":
        reaper.dismiss()
        print("dismissed", flush=True)
time.sleep(600)
"""


class Owner:
    """A running owner."""

    def __init__(self, group: str, *, reaps: bool = True, lease_s: float = 0.0) -> None:
        self.group = group
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, group, "reaps" if reaps else "does not", str(lease_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.say, self.answers = self.process.stdin, self.process.stdout
        self.reaper = int(self.answers.readline())

    def children(self) -> dict[int, GroupMark]:
        return marked_processes(lambda mark: mark.group == self.group)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        kill_group(self.group, LIMIT_S)


@pytest.fixture
def owners() -> Iterator[list[Owner]]:
    started: list[Owner] = []
    yield started
    for owner in started:
        owner.end()


def until_gone(pids: object) -> None:
    """Wait until none of the processes is alive; the reaper tells nobody."""
    assert isinstance(pids, dict | list)
    deadline_s = time.monotonic() + LIMIT_S
    while any(start_ticks(pid) is not None for pid in pids):
        assert time.monotonic() < deadline_s, f"alive: {[pid for pid in pids if start_ticks(pid) is not None]}"
        time.sleep(0.01)


@given(
    group=st.text("0123456789abcdefg", min_size=1),
    rank=st.none() | st.integers(0, 99),
    pid=st.integers(1, 2**22),
    started=st.integers(0, 2**40),
)
def test_a_mark_is_read_as_it_was_written(group: str, rank: int | None, pid: int, started: int) -> None:
    mark = GroupMark(group, rank, this_machine(), pid, started)
    assert GroupMark.from_text(mark.to_text()) == mark


def test_an_owner_is_known_by_machine_id_and_start() -> None:
    mark = GroupMark.of_this_process("g")
    assert not mark.owner_is_gone()
    assert GroupMark("g", None, mark.machine, mark.owner_pid, mark.owner_started + 1).owner_is_gone()
    assert not GroupMark("g", None, "another machine", mark.owner_pid, 0).owner_is_gone()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_the_reaper_kills_what_a_dead_owner_started(owners: list[Owner], number: signal.Signals) -> None:
    owners.append(Owner(f"reaped{number}"))
    owner = owners[0]
    children = owner.children()
    assert len(children) == 3
    os.kill(owner.process.pid, number)
    until_gone(children)
    until_gone([owner.reaper])  # and it ends itself


def test_the_reaper_is_not_of_its_owner_s_family_and_survives_sigterm(owners: list[Owner]) -> None:
    owners.append(Owner("apart"))
    owner = owners[0]
    assert os.getsid(owner.reaper) == owner.reaper
    os.kill(owner.reaper, signal.SIGTERM)
    children = owner.children()
    os.killpg(owner.reaper, signal.SIGINT)
    owner.process.kill()
    until_gone(children)


def test_a_dismissed_reaper_kills_nothing(owners: list[Owner]) -> None:
    owners.append(Owner("dismissed"))
    owner = owners[0]
    owner.say.write("dismiss\n")
    owner.say.flush()
    owner.answers.readline()
    until_gone([owner.reaper])
    assert len(owner.children()) == 3
    owner.process.kill()
    owner.process.wait()
    assert len(owner.children()) == 3


def test_a_lease_that_is_not_renewed_ends_the_children_though_the_owner_lives(owners: list[Owner]) -> None:
    owners.append(Owner("lease", lease_s=1.0))
    owner = owners[0]
    until_gone(owner.children())
    assert owner.process.poll() is None


def test_what_a_dead_owner_without_a_reaper_left_is_stale(owners: list[Owner]) -> None:
    owners += [Owner("stale", reaps=False), Owner("alive", reaps=False)]
    stale, alive = owners
    stale.process.kill()
    stale.process.wait()
    children = stale.children()
    assert len(children) == 3
    assert "stale" in kill_stale_groups(LIMIT_S)
    until_gone(children)
    assert len(alive.children()) == 3


def test_killing_a_group_leaves_others_alone(owners: list[Owner]) -> None:
    owners += [Owner("one", reaps=False), Owner("other", reaps=False)]
    assert kill_group("one", LIMIT_S) == {}
    assert not owners[0].children()
    assert len(owners[1].children()) == 3


def test_a_process_lives_until_its_last_thread_has_ended() -> None:
    """The first thread ends alone, as it does in a killed process whose others are still at the GPU."""
    number = {"x86_64": 60, "aarch64": 93}[platform.machine()]  # exit(2) of the calling thread
    program = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "print('two', flush=True)\n"
        f"ctypes.CDLL(None).syscall({number}, 0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        output.readline()
        stat = Path(f"/proc/{process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert start_ticks(process.pid) is not None
    process.kill()
    until_gone([process.pid])
    process.wait()


def test_a_process_does_not_kill_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from serve.workers.processes import kill_group\nprint(kill_group('me', 5.0) == {})\n"
    mark = GroupMark.of_this_process("me").to_text()
    monkeypatch.setenv(GROUP_VARIABLE, mark)
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "True\n"


def test_a_reaper_of_a_rank_spares_the_other_ranks(owners: list[Owner]) -> None:
    """Its children carry rank 0; a reaper for rank 1 whose lease runs out finds none of them."""
    owners.append(Owner("ranks", reaps=False))
    reaper = Reaper(GroupMark.of_this_process("ranks").for_rank(1), lease_s=0.2)
    until_gone([reaper.pid])
    reaper.dismiss()
    assert len(owners[0].children()) == 3
    reaper = Reaper(GroupMark.of_this_process("ranks").for_rank(0), lease_s=0.2)
    until_gone(owners[0].children())
    until_gone([reaper.pid])
    reaper.dismiss()
