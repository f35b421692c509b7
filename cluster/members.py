"""Members of a cluster: their plans, processes, lives, GPUs and places, as starts, ends and reports change them. Pure.

A member is a place in the plan; a life of it is one process, which the routers know by its incarnation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .deployment.record import Changing, MemberRecord
from .devices import Devices
from .launch.last_words import DeviceEnd, ProcessEnd
from .lives import Life
from .operations.room import Room
from .placement import Plan, ProcessPlan
from .restarts import RestartBook, Standing, Use


@dataclass(frozen=True, slots=True)
class Ended:
    """Consequences of the end of a member's process."""

    end: ProcessEnd  # as it counts
    due_s: float | None = None  # of its restart; None: it is not started again
    moved: str = ""  # says that it gets another GPU, and why
    is_withheld: bool = False  # no usable GPU is left for it, for the reason in `end`


class Members:
    """All members of one cluster, by name."""

    def __init__(self, plan: Plan, book: RestartBook) -> None:
        """`book`: decides about restarts; every member that is wanted must be told to it."""
        self.plans = {member.name: member for member in plan.members}
        self.book = book
        self.room = Room(plan)
        self.running: set[str] = set()  # members whose process was started and has not ended
        self.going: dict[str, bool] = {}  # members that leave for good; True: their place is free then
        self._devices = Devices(plan.spare_gpus)
        self._life: dict[str, str] = {}  # incarnation of each member that serves or served
        self._ended_life: dict[str, str] = {}  # incarnation whose process has ended; the router may not know yet
        self._cordons: dict[str, str] = {}  # members whose present life reports a cordoned GPU, with the reason
        self._replaced: set[str] = set()  # members that were killed by us and whose end is not reported yet

    # ------------------------------------------------------------------ questions

    def of_kind(self, kind: str) -> list[str]:
        """Names of all "router" or all "worker" members."""
        return [member.name for member in self.plans.values() if member.kind == kind]

    @property
    def cordoned_gpus(self) -> dict[int, str]:
        """GPUs that no worker may use, with the reason."""
        return self._devices.cordoned

    def standing(self, name: str) -> Standing | None:
        """State of a member; None: there is none of this name."""
        return self.book.standing(name) if name in self.plans else None

    @property
    def num_owned(self) -> int:
        """Number of workers that run or will be restarted."""
        return sum(1 for name in self.of_kind("worker") if self.book.owned(name))

    # ------------------------------------------------------------------ another supervisor's members

    def restore(self, now: Changing) -> None:
        """Take the members as another supervisor had them."""
        self.plans = {name: member.plan for name, member in now.members.items()}
        self.going = {name: member.frees_place for name, member in now.members.items() if member.is_going}
        self._devices = Devices(now.spare_gpus)
        self.room.restore(now.free_places, now.next_numbers)

    def present(self, handle_of: Callable[[str], str | None]) -> Changing:
        """What another supervisor must know. `handle_of(name)`: of the member's process; None: it has none."""
        members = {
            name: MemberRecord(member, handle_of(name), name in self.going, self.going.get(name, True))
            for name, member in self.plans.items()
        }
        return Changing(members, self._devices.spare, self.room.free, self.room.next_numbers)

    # ------------------------------------------------------------------ changes

    def add(self, member: ProcessPlan, now_s: float) -> None:
        """A further member is wanted from now on."""
        self.plans[member.name] = member
        if member.device == "cuda":
            self._devices.take(member.gpu)
        self.book.want(member.name, now_s)

    def let_go(self, name: str, *, frees_place: bool) -> None:
        """A member is never started again. Its end, whenever it comes, is its last."""
        self.book.stop(name)
        self.going[name] = frees_place

    def keep(self, name: str, now_s: float) -> None:
        """A member that was let go stays after all. One whose process has ended meanwhile is gone."""
        if self.going.pop(name, None) is not None:
            self.book.resume(name, now_s)

    def forget(self, name: str) -> bool:
        """A member is gone for good. False: there is none of this name."""
        if name not in self.plans:
            return False
        member, frees_place = self.plans.pop(name), self.going.pop(name, True)
        self.book.forget(name)
        for told in (self._life, self._ended_life, self._cordons):
            told.pop(name, None)
        if frees_place:
            self.room.give_back(member)
        if member.device == "cuda":
            self._devices.give_back(member.gpu)
        return True

    def set_metrics_port(self, name: str, port: int | None) -> None:
        """The next process of a member exports its metrics on this port."""
        self.plans[name] = replace(self.plans[name], metrics_port=port)

    # ------------------------------------------------------------------ its processes

    def is_due(self, name: str) -> bool:
        """True if a member waits for its start, and was not let go meanwhile."""
        return self.standing(name) is Standing.WAITING

    def started(self, name: str, now_s: float) -> None:
        """A member's process is started."""
        self.book.started(name, now_s)
        self.running.add(name)

    def replaced(self, name: str) -> None:
        """A member's process is killed by us: so its end counts as that, whatever it looks like."""
        self._replaced.add(name)

    def ended(self, name: str, end: ProcessEnd, now_s: float) -> Ended | None:
        """A member's process has ended. None: it was let go, and is forgotten now, or it was so before."""
        self.running.discard(name)
        if name not in self.plans:
            return None
        if name in self.going:
            self.forget(name)
            return None
        if name in self._replaced:
            self._replaced.remove(name)
            end = ProcessEnd("killed, to be replaced")
        self._ended_life[name] = self._life.get(name, "")
        cordon = self._cordons.pop(name, None)
        if cordon is not None:  # whatever ended it in the end
            end = ProcessEnd(cordon, device=DeviceEnd.CORDONED)
        moved = ""
        if end.device is DeviceEnd.CORDONED or (
            end.device is DeviceEnd.FAULT and self._devices.faulted(self.plans[name].gpu, now_s)
        ):
            cause = end.cause
            if end.device is DeviceEnd.FAULT:
                cause += "; the last of too many faults of this GPU"
            moved = self._move(name, cause)
            if not moved:
                self.book.withhold(name, cause, now_s)
                return Ended(ProcessEnd(cause), is_withheld=True)
        return Ended(end, self.book.ended(name, end.cause, now_s), moved)

    def _move(self, name: str, cause: str) -> str:
        """Cordon a member's GPU and give the member another one; returns what is said of it. Empty: none is free."""
        gpu = self.plans[name].gpu
        spare = self._devices.cordon(gpu, cause)
        if spare is None:
            return ""
        self.plans[name] = replace(self.plans[name], gpu=spare)
        return f"moves from GPU {gpu} to GPU {spare}: {cause}"

    # ------------------------------------------------------------------ reports of the routers

    def reported(
        self, lives: Mapping[str, Life], now_s: float, *, hears_workers: bool, hears_routers: bool
    ) -> list[str]:
        """Take what the routers report of all members; returns those that serve since now.

        `hears_workers`, `hears_routers`: a member of this kind that is not in the report is missing, not unknown.
        """
        self.book.looked(now_s)
        ready = []
        for name, member in list(self.plans.items()):
            life = lives.get(name)
            if life is not None and life.incarnation == self._ended_life.get(name):
                life = None
            if life is not None and life.use is Use.SERVES and name in self.book.starting():
                self.book.ready(name, now_s)
                ready.append(name)
            if life is not None and life.use is Use.SERVES:
                self._life[name] = life.incarnation  # one process has several, where its cache's codec changes
            if life is not None and life.cordon:
                self._cordons[name] = life.cordon
            if life is not None and life.role is not None:
                # `twostroke role` asks the worker itself. Its next process starts with the role of this one, unless the
                # process ends before the role is seen here.
                self.plans[name] = replace(member, role=life.role)
            is_heard = hears_routers if member.kind == "router" else hears_workers
            use = Use.NONE if life is None else life.use
            self.book.seen(name, use if is_heard else None, now_s)
        return ready
