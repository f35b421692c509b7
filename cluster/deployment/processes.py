"""Processes of a deployment: which one it is (not only its number), whether it lives, and all that carry its name.

A number is given to another process some time after its own has ended, so a process is known by its number, the
instant of its start, and the system's start. What Linux alone has (/proc, pidfd) is used; `can_outlive` says whether.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

NAME_OPTION = "--member-of"  # of `twostroke worker` and `twostroke router`
_PROC = Path("/proc")
_POLL_S = 0.02


class ProcessIdentity(NamedTuple):
    """One process of this machine, for ever."""

    pid: int
    started: int  # in ticks after the system's start
    boot: str  # id of the system's start

    @property
    def handle(self) -> str:
        """The same as text."""
        return f"{self.pid} {self.started} {self.boot}"

    @classmethod
    def of_handle(cls, handle: str) -> ProcessIdentity | None:
        """The process that a `handle` names; None: it is no handle."""
        pid, _, rest = handle.partition(" ")
        started, _, boot = rest.partition(" ")
        return cls(int(pid), int(started), boot) if pid.isdecimal() and started.isdecimal() and int(pid) > 1 else None


class Named(NamedTuple):
    """A process that carries a deployment's name."""

    identity: ProcessIdentity
    deployment: str


def can_outlive() -> bool:
    """True where a process can be known for the same one again."""
    return hasattr(os, "pidfd_open") and (_PROC / "self" / "stat").exists()


def identity_of(pid: int) -> ProcessIdentity | None:
    """The process that has this number now; None: none has, or it has ended and waits for its parent."""
    try:
        state, *fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if state in "ZX" else ProcessIdentity(pid, int(fields[18]), boot)


def lives(identity: ProcessIdentity) -> bool:
    """True if the process has not ended."""
    return identity_of(identity.pid) == identity


def is_stopped(pid: int) -> bool:
    """True if a signal (SIGSTOP, Ctrl-Z) has stopped the process. One that a debugger holds is not meant."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def named_in(folder: Path) -> Iterator[Named]:
    """Processes of our user that carry the name of a deployment of this run folder, whatever its id.

    The name is one whole argument (`NAME_OPTION FOLDER@ID`); nothing else of the command line counts.
    """
    prefix = name_of(folder, "").encode()
    for entry in _PROC.glob("[0-9]*"):
        with suppress(OSError):
            if entry.stat().st_uid != os.getuid() or int(entry.name) == os.getpid():
                continue
            identity = identity_of(int(entry.name))
            words = (entry / "cmdline").read_bytes().split(b"\0")
            for option, value in pairwise(words):
                if identity and option == NAME_OPTION.encode() and value.startswith(prefix) and lives(identity):
                    yield Named(identity, value[len(prefix) :].decode(errors="replace"))
                    break


def name_of(folder: Path, deployment: str) -> str:
    """The name that each member of a deployment carries."""
    return f"{folder.absolute()}@{deployment}"


@contextmanager
def opened(identity: ProcessIdentity) -> Iterator[int | None]:
    """A file descriptor of exactly this process, while the context lasts; None: it has ended."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor if lives(identity) else None  # asked after it was opened: it cannot be another one now
    finally:
        os.close(descriptor)


def send(identity: ProcessIdentity, number: signal.Signals) -> None:
    """Send a signal to exactly this process, if it lives."""
    with opened(identity) as descriptor, suppress(ProcessLookupError, PermissionError):
        if descriptor is not None:
            signal.pidfd_send_signal(descriptor, number)


def kill_group(identity: ProcessIdentity) -> None:
    """Send SIGKILL to a member and the processes that it started; each member leads a group of its own."""
    with opened(identity) as descriptor, suppress(ProcessLookupError, PermissionError):
        if descriptor is None:
            return
        if os.getpgid(identity.pid) == identity.pid:
            os.killpg(identity.pid, signal.SIGKILL)
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def wait_for_ends(identities: list[ProcessIdentity], within_s: float) -> list[ProcessIdentity]:
    """Wait until all have ended, or for `within_s`; returns those that still live."""
    end_s = time.monotonic() + within_s
    while (left := [identity for identity in identities if lives(identity)]) and time.monotonic() < end_s:
        time.sleep(_POLL_S)
    return left
