"""What a new supervisor does with what an earlier one left: adopt, begin anew, or refuse. Pure.

          no record ────────────────▶ Anew: members that carry the deployment's name are in no record and are ended
    record, all members dead ───────▶ Anew, the same
    record, some members live ──┬───▶ Adopt: they are supervised, the dead ones restarted, unknown ones ended
                                └───▶ Refuse: another release, other settings, another launcher

A process is a member if the record names it (by number and start) and it carries the deployment's id. One that carries
the id and is not recorded was being started when the supervisor was killed; it may have half of its configuration.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from .record import Record
from .settings import changed, told


class Anew(NamedTuple):
    """Start a new deployment, after the end of `strays`."""

    strays: tuple[str, ...]  # handles


class Adopt(NamedTuple):
    """Supervise the living members."""

    living: dict[str, str]  # handle by name
    dead: tuple[str, ...]  # names; they are started again
    strays: tuple[str, ...]  # handles


class Refuse(NamedTuple):
    """Leave everything as it is."""

    reason: str


class Given(NamedTuple):
    """What the new supervisor was started with."""

    release: str
    launcher: str
    settings: Mapping[str, str]  # digests under the record's salt; empty without a record


def decide(record: Record | None, found: Mapping[str, str], given: Given) -> Anew | Adopt | Refuse:
    """`found`: of each living process that carries the name of a deployment of this folder, handle and deployment."""
    if record is None:
        return Anew(tuple(found))
    handles = {name: member.handle for name, member in record.now.members.items()}
    living = {name: handle for name, handle in handles.items() if handle and found.get(handle) == record.deployment}
    if not living:
        return Anew(tuple(found))
    if reason := _difference(record, given, living):
        return Refuse(reason)
    dead = tuple(name for name in handles if name not in living)
    return Adopt(living, dead, _strays(found, living.values()))


def _strays(found: Mapping[str, str], known: Collection[str]) -> tuple[str, ...]:
    return tuple(handle for handle in found if handle not in known)


def _difference(record: Record, given: Given, living: Collection[str]) -> str:
    """Why these members cannot be supervised with what is given; empty: they can."""
    what = ""
    if record.release != given.release:
        what = f"they are of release {record.release}, and this is {given.release}"
    elif record.launcher != given.launcher:
        what = f"they were started with --launcher {record.launcher}, and this is {given.launcher}"
    elif names := changed(record.settings, given.settings):
        what = f"they were started with other settings; these differ: {told(names)}"
    return what and f"{len(living)} members serve without a supervisor ({', '.join(sorted(living))}), and {what}"


def serves_on(*, is_adopted: bool, is_served: bool, is_asked: bool) -> bool:
    """Whether the members live on when their supervisor fails or is stopped.

    `is_served`: all of them served under it; `is_asked`: it was told to end the cluster. A start that fails leaves
    nothing; an adoption that fails, or is given up, ends nothing.
    """
    return not is_asked if is_served else is_adopted
