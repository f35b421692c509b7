"""A small cluster as a graph: its states, and the events that lead from one to the next, faults included.

    router ◀─ session ─▶ decode workers (service, tasks, pool) ◀─ hand-over streams ─▶ prefill workers (jobs, pool)

Decisions are automata of production machines (`machines.py`, `deciders.py`). Here are the wires between them, the
abstract engines with their pools, and the checks of what reaches a pool. A wire keeps its order; a fault may lose,
repeat, swap, truncate or damage the message that arrives next, or put one of an older dispatch before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..invariants import Violation
from .automaton import Automaton
from .deciders import Router, Service
from .edit import Edit, described
from .given import TOKENS
from .machines import DecodeSide, PrefillSide
from .state import (
    GONE,
    MAX_KNOWN_STEPS,
    NEEDED,
    POOL,
    Broken,
    Link,
    Move,
    Reached,
    Scope,
    State,
    Step,
    Task,
    TaskMove,
)


class Cluster:
    """All automata of one scope, and the moves of its states."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.router = Automaton(lambda: Router(scope.requests, scope.prefill, scope.decode))
        self.service = Automaton(Service)
        self.tasks = {
            (peers, resumed): Automaton(lambda peers=peers, resumed=resumed: DecodeSide(peers, resumed))  # type: ignore[misc]
            for peers in range(scope.prefill + 1)
            for resumed in range(len(TOKENS))
        }
        self.job = Automaton(PrefillSide)
        self._known_steps: dict[Any, list[Step]] = {}
        self._numbers: dict[Any, int] = {}
        self.values: list[Any] = []
        self.names: dict[int, str] = {}

    @property
    def automata(self) -> dict[str, Automaton]:
        """Every automaton, by its name."""
        tasks = {
            f"decode task, {peers} peers" + (f", after {resumed}" if resumed else ""): automaton
            for (peers, resumed), automaton in self.tasks.items()
        }
        return {"router": self.router, "decode service": self.service, **tasks, "prefill job": self.job}

    def number(self, value: Any) -> int:
        """The number of a message."""
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self.values)
            self.values.append(value)
        return number

    def first(self) -> State:
        """The state after every request was dispatched."""
        scope = self.scope
        no_messages: tuple[tuple[int, ...], ...] = ((),) * scope.decode
        empty = State(
            scope.faults,
            0,
            (0,) * scope.decode,
            (0,) * scope.decode,
            no_messages,
            no_messages,
            (0,) * scope.decode,
            (0,) * scope.prefill,
            False,
            (),
        )
        edit = Edit(self, empty)
        edit.tell_router(("begin",))
        return edit.result()

    def _after(self, state: State, move: Move) -> State:
        edit = Edit(self, state)
        if move.is_fault:
            edit.faults_left -= 1
        move.act(edit)
        reached = edit.result()
        self._check_living(reached)
        return reached

    def _check_living(self, state: State) -> None:
        """Check R8: a worker computes a request only for its newest dispatch, or the word to end is on its way."""
        living = self.router.facts[state.router][2]
        for task in state.tasks:
            is_computed = task.task != GONE and task.stage not in ("", "cancelled")
            if not is_computed or living[task.request] == task.epoch or state.is_session_lossy:
                continue
            if not state.orders[task.decode] and state.sessions[task.decode] == task.session:
                raise Violation(
                    "R8", f"r{task.request} is computed on d{task.decode} under epoch {task.epoch}, for no one"
                )

    def is_end(self, state: State) -> bool:
        """True if every request is over and nothing is left of any.

        Raises:
            Violation: everything is over, and a block or a task is left.
        """
        if state.tasks or any(state.orders) or any(state.outputs):
            return False
        for index, service in enumerate(state.services):
            if not state.dead_decode[index] and any(self.service.facts[service]):
                return False
        return bool(self.router.facts[state.router][3])

    # ------------------------------------------------------------------ moves

    def steps(self, state: State) -> Iterator[Reached]:
        """Everything that can happen next, with the states that it leads to.

        Raises:
            Broken: a move breaks an invariant.
        """
        num_fair = 0
        for move in self._fair_of_all(state):
            num_fair += 1
            yield self._reached(state, move)
        local = [self._task_steps(state, place) for place in range(len(state.tasks))]
        for steps in local:
            for step in steps:
                if not step.is_fault:
                    num_fair += 1
                    yield self._taken(state, step)
        if state.faults_left and not self.is_end(state):
            for move in self._faults(state):
                yield self._reached(state, move)
            for steps in local:
                for step in steps:
                    if step.is_fault:
                        yield self._taken(state, step)
        if not num_fair and state.is_session_lossy:  # what is left is the deadline
            for index, outcome in enumerate(self.router.facts[state.router][0]):
                if outcome is None:
                    yield self._reached(state, Move(f"deadline of r{index} passes", False, _tell("expire", index)))

    def _reached(self, state: State, move: Move) -> Reached:
        try:
            return Reached(move.label, move.is_fault, self._after(state, move))
        except Violation as violation:
            raise Broken(move.label, violation) from violation
        except Exception as error:
            raise Broken(move.label, Violation("crash", f"{type(error).__name__}: {error}")) from error

    def _task_steps(self, state: State, place: int) -> list[Step]:
        """The moves of one task. Those that touch nothing but the task and its worker's output are worked out once."""
        task = state.tasks[place]
        d = task.decode
        context = (
            task,
            state.dead_decode[d],
            state.dead_prefill,
            state.sessions[d] == task.session,
            sorted(block for t in state.tasks if t.decode == d for block in t.blocks).__repr__(),
            self._prefill_blocks(state, task),
            state.faults_left > 0,
        )
        known = self._known_steps.get(context)
        if known is None:
            known = []
            for move in self._moves_of_task(state, task):
                found = Step(move.label, move.is_fault, move.act, None, ())
                try:
                    bound = Move(move.label, move.is_fault, _at(move.act, place))
                    found = self._local(state, place, move, self._after(state, bound))
                except Exception:
                    pass  # `steps` comes to it, and reports it
                known.append(found)
            if len(self._known_steps) >= MAX_KNOWN_STEPS:
                self._known_steps.clear()
            self._known_steps[context] = known
        return [step._replace(place=place) if step.place != place else step for step in known]

    def _prefill_blocks(self, state: State, task: Task) -> tuple[tuple[int, ...], ...]:
        """Blocks that are taken on each prefill worker where a job of this task waits for room."""
        waits = {s.prefill for s in task.links if s is not None and s.stage == "bound"}
        links = [s for t in state.tasks for s in t.links if s is not None] if waits else []
        return tuple(tuple(sorted(b for s in links if s.prefill == p for b in s.blocks)) for p in sorted(waits))

    def _local(self, before: State, place: int, move: TaskMove, after: State) -> Step:
        """The step of a move, with its result if that depends on nothing but the context of `_task_steps`."""
        step = Step(move.label, move.is_fault, move.act, None, (), place)
        d = before.tasks[place].decode
        is_same = before[1:5] == after[1:5] and before[6:9] == after[6:9] and len(before.tasks) == len(after.tasks)
        if not is_same or any(
            o != p for i, (o, p) in enumerate(zip(before.tasks, after.tasks, strict=True)) if i != place
        ):
            return step
        if any(o != p for i, (o, p) in enumerate(zip(before.outputs, after.outputs, strict=True)) if i != d):
            return step
        return step._replace(after=after.tasks[place], says=after.outputs[d][len(before.outputs[d]) :])

    def _taken(self, state: State, step: Step) -> Reached:
        if step.after is None:
            return self._reached(state, Move(step.label, step.is_fault, _at(step.act, step.place)))
        place, outputs = step.place, state.outputs
        if step.says:
            d = step.after.decode
            outputs = (*outputs[:d], outputs[d] + step.says, *outputs[d + 1 :])
        tasks = (*state.tasks[:place], step.after, *state.tasks[place + 1 :])
        left = state.faults_left - step.is_fault
        return Reached(step.label, step.is_fault, State(left, *state[1:5], outputs, *state[6:9], tasks))

    def _moves_of_task(self, state: State, task: Task) -> Iterator[TaskMove]:
        yield from self._fair_of_task(state, task)
        for k, stream in enumerate(task.links):
            if stream is not None:
                yield from self._fair_of_link(state, task, k, stream)
        if state.faults_left:
            name = f"r{task.request}.{task.epoch} on d{task.decode}"
            if task.task != GONE and task.stage not in ("", "cancelled"):
                yield TaskMove(f"{name}: engine's deadline", True, lambda e, n: e.expire_sequence(n))
            for k, stream in enumerate(task.links):
                if stream is not None:
                    yield from self._faults_of_link(task, k, stream)

    def ample(self, state: State) -> list[Reached] | None:
        """An ample set: moves of one task that commute with all other moves of the state; None: there is no such set.

        Only without faults left. The task's request is still its own: nothing can be on its way that ends it. Its moves
        touch neither pool, session nor service, and no move of others can enable another move of it.
        Source: Baier and Katoen 2008, section 8.2 (partial order reduction).
        """
        living = self.router.facts[state.router][2]
        for place, task in enumerate(state.tasks):
            d = task.decode
            is_own = living[task.request] == task.epoch and not state.orders[d] and not state.dead_decode[d]
            if not is_own or task.task == GONE or state.sessions[d] != task.session or task.stage in ("waits", "asked"):
                continue
            if state.is_session_lossy and state.outputs[d]:
                continue  # the router may find that tokens are missing, and cancel
            if any(stream.stage == "bound" for stream in task.links if stream is not None):
                continue
            steps = self._task_steps(state, place)
            if steps and all(self._is_quiet(task, step) for step in steps):
                return [self._taken(state, step) for step in steps]
        return None

    def _is_quiet(self, before: Task, step: Step) -> bool:
        """True if a move says nothing, and takes and frees no block."""
        after = step.after
        if after is None or step.says or before.blocks != after.blocks or after.stage in ("waits", "asked"):
            return False
        held = [stream.blocks for stream in before.links if stream is not None and stream.blocks]
        return held == [stream.blocks for stream in after.links if stream is not None and stream.blocks]

    def _fair_of_all(self, state: State) -> Iterator[Move]:
        """Fair moves of router, sessions and timers: they happen by themselves in the end."""
        for d in range(self.scope.decode):
            dead = state.dead_decode[d]
            if state.orders[d] and not dead:
                yield Move(f"d{d} takes an order", False, lambda e, d=d: e.take_order(d, 1))  # type: ignore[misc]
            if state.outputs[d]:
                yield Move(f"router takes d{d}'s output", False, lambda e, d=d: e.take_output(d, 1))  # type: ignore[misc]
            elif dead and dead < 10:
                yield Move(f"router loses d{d}", False, lambda e, d=d: e.lose_decode(d))  # type: ignore[misc]
            if not dead and state.sessions[d] < 0:
                yield Move(f"router comes back to d{d}", False, lambda e, d=d: e.reconnect(d))  # type: ignore[misc]
            if not dead and self.service.facts[state.services[d]][1]:
                yield Move(f"grace on d{d} ends", False, lambda e, d=d: e.tell_service(d, ("grace",)))  # type: ignore[misc]
        for p, dead in enumerate(state.dead_prefill):
            if dead and dead < 10:
                yield Move(f"router loses p{p}", False, lambda e, p=p: e.lose_prefill(p))  # type: ignore[misc]
        for index, waits in enumerate(self.router.facts[state.router][1]):
            if waits:
                yield Move(f"patience of r{index} ends", False, _tell("patience", index))

    def _fair_of_task(self, state: State, task: Task) -> Iterator[TaskMove]:
        name = f"r{task.request}.{task.epoch} on d{task.decode}"
        if task.task == GONE:
            return
        if task.writes:
            yield TaskMove(f"{name} stores block {task.writes[0]}", False, lambda e, n: e.store(n))
        if task.stage == "asked":
            yield TaskMove(f"{name} is told: not yet", False, lambda e, n: e.put_off(n))
            yield TaskMove(f"{name} is bound", False, lambda e, n: e.bind(n))
        room = len(task.blocks) == NEEDED or POOL - _taken_decode(state, task.decode) >= NEEDED
        if task.stage == "waits" and room:
            yield TaskMove(f"{name} is bound", False, lambda e, n: e.bind(n))
        elif task.stage == "decodes" or (task.stage == "local" and room):
            yield TaskMove(f"{name} generates to its end", False, lambda e, n: e.finish(n))
        elif task.stage == "cancelled":
            yield TaskMove(f"{name} is freed", False, lambda e, n: e.end_sequence(n))

    def _fair_of_link(self, state: State, task: Task, k: int, stream: Link) -> Iterator[TaskMove]:
        name = f"r{task.request}.{task.epoch} d{task.decode}-p{stream.prefill}"
        decode_facts = None if task.task == GONE else self.tasks[len(task.peers), task.resumed].facts[task.task]
        job_facts = self.job.facts[stream.job] if stream.job >= 0 else None
        dead_peer, dead_self = state.dead_prefill[stream.prefill] % 10, state.dead_decode[task.decode] % 10
        if stream.job != GONE:
            if stream.up:
                yield TaskMove(f"{name}: {self.name(stream.up[0])} arrives", False, lambda e, n: e.deliver_up(n, k))
            elif stream.up_end == 1:
                yield TaskMove(f"{name}: prefill sees the end", False, lambda e, n: e.end_up(n, k))
            elif dead_self == 2 and stream.up_end == 0 and not (job_facts and not job_facts.is_waiting):
                yield TaskMove(f"{name}: prefill hears nothing", False, lambda e, n: e.silent_job(n, k))
            if stream.stage == "queued":
                yield TaskMove(f"{name}: next to run", False, lambda e, n: e.offer(n, k))
            elif stream.stage == "bound" and POOL - _taken_prefill(state, stream.prefill) >= NEEDED:
                yield TaskMove(f"{name}: the prompt is computed", False, lambda e, n: e.compute(n, k))
        if stream.is_heard and task.task != GONE:
            if stream.down:
                yield TaskMove(f"{name}: {self.name(stream.down[0])} arrives", False, lambda e, n: e.deliver_down(n, k))
            elif stream.down_end == 1:
                yield TaskMove(f"{name}: decode sees the end", False, lambda e, n: e.end_down(n, k))
            elif dead_peer == 2 and stream.down_end == 0 and decode_facts is not None and decode_facts.is_waiting:
                yield TaskMove(f"{name}: decode hears nothing", False, lambda e, n: e.tell_task(n, ("silent",)))
        yield from self._beats(name, k, stream, decode_facts, job_facts)

    def _beats(self, name: str, k: int, stream: Link, decode_facts: Any, job_facts: Any) -> Iterator[TaskMove]:
        """A beat that shows the other side that a message is missing. Other beats change nothing."""
        if decode_facts is not None and decode_facts.is_waiting and stream.is_heard and not stream.up:
            received = job_facts.received if job_facts is not None else 0
            if stream.up_end == 0 and stream.job != GONE and decode_facts.sent > received:
                yield TaskMove(f"{name}: decode beats", False, lambda e, n: e.tell_task(n, ("beat",)))
        if job_facts is not None and job_facts.is_waiting and stream.is_heard and not stream.down:
            is_behind = decode_facts is not None and decode_facts.is_waiting and decode_facts.received < job_facts.sent
            if stream.down_end == 0 and is_behind:
                yield TaskMove(f"{name}: prefill beats", False, lambda e, n: e.tell_job(n, k, ("beat",)))

    def _faults(self, state: State) -> Iterator[Move]:
        yield from self._deaths(state)
        router = self.router.facts[state.router]
        for index, outcome in enumerate(router[0]):
            if outcome is None:
                yield Move(f"client of r{index} leaves", True, _tell("abort", index))
                yield Move(f"deadline of r{index} passes", True, _tell("expire", index))
        for d in range(self.scope.decode):
            if state.dead_decode[d]:
                continue
            if state.orders[d]:
                yield Move(f"d{d}'s order is lost", True, lambda e, d=d: e.drop_order(d))  # type: ignore[misc]
                yield Move(f"d{d}'s order comes twice", True, lambda e, d=d: e.take_order(d, 0))  # type: ignore[misc]
            if state.outputs[d]:
                yield Move(f"d{d}'s output is lost", True, lambda e, d=d: e.drop_output(d))  # type: ignore[misc]
                yield Move(f"d{d}'s output comes twice", True, lambda e, d=d: e.take_output(d, 0))  # type: ignore[misc]
            if state.sessions[d] >= 0:
                yield Move(f"session to d{d} breaks", True, lambda e, d=d: e.break_session(d))  # type: ignore[misc]

    def _deaths(self, state: State) -> Iterator[Move]:
        is_over = self.router.facts[state.router][3]
        for kind, how in ((1, "crashes"), (2, "vanishes")):
            for d, dead in enumerate(state.dead_decode):
                busy = state.orders[d] or any(task.decode == d for task in state.tasks)
                if not dead and busy and not is_over:
                    yield Move(f"d{d} {how}", True, lambda e, d=d, kind=kind: e.kill_decode(d, kind))  # type: ignore[misc]
            for p, dead in enumerate(state.dead_prefill):
                if not dead and not is_over:
                    yield Move(f"p{p} {how}", True, lambda e, p=p, kind=kind: e.kill_prefill(p, kind))  # type: ignore[misc]

    def _faults_of_link(self, task: Task, k: int, stream: Link) -> Iterator[TaskMove]:
        name = f"r{task.request}.{task.epoch} d{task.decode}-p{stream.prefill}"
        can_hear_up = stream.job != GONE
        can_hear_down = stream.is_heard and task.task != GONE
        for queue, is_up, can_hear in ((stream.up, True, can_hear_up), (stream.down, False, can_hear_down)):
            if not queue or not can_hear:
                continue
            what = f"{name}: {self.name(queue[0])}"
            for fault in ("lost", "twice", "cut", "older"):
                yield TaskMove(f"{what}: {fault}", True, _damage(k, is_up, fault))
            if len(queue) > 1:
                yield TaskMove(f"{what}: overtaken", True, _damage(k, is_up, "swap"))
            if self.name(queue[0]).startswith("frame"):
                yield TaskMove(f"{what}: damaged", True, _damage(k, is_up, "bit"))
                if not stream.is_rotten:
                    yield TaskMove(f"{what}: damaged, and every one after it", True, _damage(k, is_up, "rot"))
        facts = None if task.task == GONE else self.tasks[len(task.peers), task.resumed].facts[task.task]
        if facts is not None and facts.is_waiting and can_hear_down:
            yield TaskMove(f"{name}: decode hears nothing, though prefill lives", True, _time(-1, "silent"))
        if facts is not None and not facts.is_over and k == len(task.links) - 1:
            yield TaskMove(f"{name}: deadline of the pull", True, _time(-1, "deadline"))
        if stream.job >= 0 and self.job.facts[stream.job].is_waiting:
            yield TaskMove(f"{name}: prefill hears nothing, though decode lives", True, _time(k, "silent"))
            yield TaskMove(f"{name}: deadline of the job", True, _time(k, "deadline"))

    def name(self, number: int) -> str:
        """Short description of a message on a stream."""
        name = self.names.get(number)
        if name is None:
            name = self.names[number] = described(self.values[number])
        return name


def _taken_decode(state: State, decode: int) -> int:
    return sum(len(task.blocks) for task in state.tasks if task.decode == decode)


def _taken_prefill(state: State, prefill: int) -> int:
    return sum(len(s.blocks) for task in state.tasks for s in task.links if s is not None and s.prefill == prefill)


def _tell(*event: Any) -> Callable[[Edit], None]:
    """A move that is an event of the router."""
    return lambda edit: edit.tell_router(event)


def _at(act: Callable[[Edit, int], None], place: int) -> Callable[[Edit], None]:
    """A move of the task at a place."""
    return lambda edit: act(edit, place)


def _damage(k: int, is_up: bool, fault: str) -> Callable[[Edit, int], None]:
    """A fault of the next message of a task's stream."""
    return lambda edit, place: edit.damage(place, k, is_up, fault)


def _time(k: int, kind: str) -> Callable[[Edit, int], None]:
    """A timer of a task's job, or for `k` below 0 of its pull."""

    def happen(edit: Edit, place: int) -> None:
        if k >= 0:
            edit.tell_job(place, k, (kind,))
            return
        edit.tell_task(place, (kind,))
        if kind == "deadline":
            edit.expire_sequence(place)

    return happen
