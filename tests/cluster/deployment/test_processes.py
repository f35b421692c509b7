"""Processes are known for the same ones again, and those of a folder are found by their name alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from twostroke.cluster.deployment.leftovers import ProcessTraces
from twostroke.cluster.deployment.processes import (
    NAME_OPTION,
    ProcessIdentity,
    identity_of,
    is_stopped,
    kill_group,
    lives,
    name_of,
    named_in,
    send,
    wait_for_ends,
)
from twostroke.cluster.launch.adopted import AdoptedProcess

WAIT = "import sys; print('here', flush=True); sys.stdin.read()"
FAMILY = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
DEAF = "import signal, sys; signal.signal(15, signal.SIG_IGN); print('here', flush=True); sys.stdin.read()"
PATIENCE_S = 60.0

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program that waits for the end of its input, with these arguments; all end with the test."""
    with ExitStack() as stack:

        def run(*words: str, program: str = WAIT) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", program, *words]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, start_new_session=True, **pipes))  # type: ignore[call-overload]
            stack.callback(process.kill)
            return process  # type: ignore[no-any-return]

        yield run


def told(process: subprocess.Popen[bytes]) -> str:
    """The first line that it says: it runs its program then."""
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def identity(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    found = identity_of(process.pid)
    assert found is not None
    return found


def test_a_process_is_another_one_than_that_which_had_its_number(start: Start):
    process = start()
    told(process)
    ours = identity(process)
    assert lives(ours)
    assert ProcessIdentity.of_handle(ours.handle) == ours
    for other in (ours._replace(started=ours.started - 1), ours._replace(boot="another")):
        assert not lives(other)
        send(other, signal.SIGKILL)
        kill_group(other)
    assert lives(ours)
    send(ours, signal.SIGTERM)
    assert process.wait(PATIENCE_S) == -signal.SIGTERM
    assert identity_of(process.pid) is None
    send(ours, signal.SIGTERM)


@pytest.mark.parametrize("handle", ["", "1 2 b", "x 2 b", "0 2 b", "-1 2 b", "7", "7 x b"])
def test_what_is_no_handle_of_a_member_names_no_process(handle: str):
    assert ProcessIdentity.of_handle(handle) is None


def test_a_process_that_ended_and_waits_for_its_parent_does_not_live(start: Start):
    process = start()
    told(process)
    ours = identity(process)
    os.kill(process.pid, signal.SIGKILL)
    assert wait_for_ends([ours], PATIENCE_S) == []  # nobody has waited for it
    assert process.returncode is None


def test_only_whole_names_of_the_same_folder_are_found(start: Start, tmp_path: Path):
    folder = tmp_path / "8001"
    ours = [start(NAME_OPTION, name_of(folder, "a")), start("worker", NAME_OPTION, name_of(folder, "b"), "--more")]
    others = [
        start(NAME_OPTION, name_of(tmp_path / "80010", "a")),
        start(NAME_OPTION, name_of(tmp_path / "2" / "8001", "a")),
        start(f"{NAME_OPTION}={name_of(folder, 'a')}"),  # no words of ours
        start("--log", name_of(folder, "a")),
        start(f"see {NAME_OPTION} {name_of(folder, 'a')}"),
        start(str(folder)),
    ]
    for process in ours + others:
        told(process)
    assert {named.identity.pid: named.deployment for named in named_in(folder)} == {
        ours[0].pid: "a",
        ours[1].pid: "b",
    }
    assert ProcessTraces(folder).end_all(None, PATIENCE_S) == 2
    assert [process.wait(PATIENCE_S) for process in ours] == [-signal.SIGTERM] * 2
    assert all(process.poll() is None for process in others)
    assert ProcessTraces(folder).end_all(None, PATIENCE_S) == 0


def test_who_does_not_end_is_killed_with_what_it_started(start: Start, tmp_path: Path):
    deaf = start(NAME_OPTION, name_of(tmp_path, "a"), program=DEAF)
    told(deaf)
    assert ProcessTraces(tmp_path).end_all(None, -2.0) == 1  # without time to drain
    assert deaf.wait(PATIENCE_S) == -signal.SIGKILL
    family = start(program=FAMILY)
    child = identity_of(int(told(family)))
    assert child is not None
    ProcessTraces(tmp_path).end_now([identity(family).handle])
    assert family.wait(PATIENCE_S) == -signal.SIGKILL
    assert wait_for_ends([child], PATIENCE_S) == []


def test_a_stopped_process_is_seen(start: Start):
    process = start()
    told(process)
    assert not is_stopped(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # until it is
    assert is_stopped(process.pid)
    os.kill(process.pid, signal.SIGCONT)
    os.waitpid(process.pid, os.WCONTINUED)
    assert not is_stopped(process.pid)


async def test_an_adopted_process_is_watched_and_ended(start: Start):
    process = start()
    told(process)
    ours = identity(process)
    assert AdoptedProcess.adopt(ours._replace(started=1)) is None
    adopted = AdoptedProcess.adopt(ours)
    assert adopted is not None
    assert (adopted.pid, adopted.has_ended) == (process.pid, False)
    waiting = asyncio.create_task(adopted.wait())
    adopted.send_signal(signal.SIGTERM)
    await asyncio.wait_for(waiting, PATIENCE_S)
    assert adopted.has_ended
    assert process.wait(PATIENCE_S) == -signal.SIGTERM
    adopted.send_signal(signal.SIGKILL)  # too late: it does nothing
    assert AdoptedProcess.adopt(ours) is None
