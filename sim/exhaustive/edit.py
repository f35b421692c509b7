"""One move of the cluster: changes the parts of a state, steps the automata, and checks what reaches a pool.

The abstract engine of a worker is here: a pool of a few blocks, and the stage of each sequence. A task's commands are
carried out at once; writes, steps and the end of a cancelled sequence are moves of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.errors import DeadlineExceeded
from ...core.request import FinishReason, SequenceKey
from ...engine.link import messages as link
from ...kv.handover.frames import Frame, WireError, decode_envelope, encode_message
from ...protos import worker_pb2
from ..invariants import Violation
from .given import OLDER, PROMPT_TOKENS, TOKENS, UNIT_TOKENS, older_frame
from .state import ALL_UNITS, GONE, NEEDED, POOL, UNOPENED, Link, State, Task

if TYPE_CHECKING:
    from .cluster import Cluster


class Edit:
    """One move under way: the parts of the state, and the reactions that follow at once."""

    def __init__(self, cluster: Cluster, state: State) -> None:
        self._c = cluster
        self.faults_left = state.faults_left
        self._router = state.router
        self._services = list(state.services)
        self._sessions = list(state.sessions)
        self._orders = list(state.orders)
        self._outputs = list(state.outputs)
        self._dead_d = list(state.dead_decode)
        self._dead_p = list(state.dead_prefill)
        self._is_lossy = state.is_session_lossy
        self._tasks: list[Task | None] = list(state.tasks)

    def result(self) -> State:
        """The state, without what is over."""
        tasks = []
        for task in self._tasks:
            if task is None:
                continue
            links = tuple(None if s is None or self._is_done(task, s) else s for s in task.links)
            if task.task == GONE and not any(links):
                continue
            tasks.append(task._replace(links=links))
        tasks.sort(key=lambda task: (task.request, task.epoch, task.decode))
        return State(
            self.faults_left,
            self._router,
            tuple(self._services),
            tuple(self._sessions),
            tuple(self._orders),
            tuple(self._outputs),
            tuple(self._dead_d),
            tuple(self._dead_p),
            self._is_lossy,
            tuple(tasks),
        )

    def _is_done(self, task: Task, stream: Link) -> bool:
        return stream.job == GONE and (not stream.is_heard or task.task == GONE)

    def _task(self, place: int) -> Task:
        task = self._tasks[place]
        assert task is not None
        return task

    def _set(self, place: int, **values: Any) -> None:
        self._tasks[place] = self._task(place)._replace(**values)

    def _link(self, place: int, k: int) -> Link:
        stream = self._task(place).links[k]
        assert stream is not None
        return stream

    def _set_link(self, place: int, k: int, **values: Any) -> None:
        links = list(self._task(place).links)
        links[k] = self._link(place, k)._replace(**values)
        self._set(place, links=tuple(links))

    # ------------------------------------------------------------------ router and sessions

    def tell_router(self, event: tuple[Any, ...]) -> None:
        """Give the router an event, and send its orders."""
        self._router, actions = self._c.router.step(self._router, event)
        for _, worker_id, kind, order in actions:
            d = int(worker_id[1:])
            if not self._dead_d[d]:
                self._orders[d] = (*self._orders[d], self._c.number((kind, order)))

    def tell_service(self, d: int, event: tuple[Any, ...]) -> None:
        """Give a decode worker's service an event, and carry out its actions."""
        self._services[d], actions = self._c.service.step(self._services[d], event)
        for action in actions:
            if action[0] == "begin":
                _, request_id, epoch, session, peers, resumed = action
                request = int(request_id[1 : request_id.index("@")])
                known = tuple(int(peer[1:]) for peer in peers)
                self._tasks.append(Task(d, request, epoch, session, 0, known, resumed, emitted=resumed))
                self.tell_task(len(self._tasks) - 1, ("start",))
            elif action[0] == "says":
                _, session, output = action
                if self._sessions[d] == session:
                    self._outputs[d] = (*self._outputs[d], self._c.number(output))
            else:
                _, request_id, epoch, reason, verdict = action
                self.tell_task(self._find(d, request_id, epoch), ("cancel", reason, verdict))

    def _find(self, d: int, request_id: str, epoch: int) -> int:
        request = int(request_id[1 : request_id.index("@")])
        for place, task in enumerate(self._tasks):
            if (
                task is not None
                and (task.decode, task.request, task.epoch) == (d, request, epoch)
                and task.task != GONE
            ):
                return place
        raise Violation("K1", f"{request_id} is cancelled on d{d}, which has no such task")

    def take_order(self, d: int, count: int) -> None:
        """Deliver the next order; `count` 0 keeps it on its way, so that it comes once more."""
        kind, order = self._c.values[self._orders[d][0]]
        self._orders[d] = self._orders[d][count:]
        self.tell_service(d, (kind, order))

    def drop_order(self, d: int) -> None:
        """Lose the next order."""
        self._is_lossy = True
        self._orders[d] = self._orders[d][1:]

    def take_output(self, d: int, count: int) -> None:
        """Deliver a worker's next output; `count` 0 keeps it on its way."""
        output = self._c.values[self._outputs[d][0]]
        self._outputs[d] = self._outputs[d][count:]
        self.tell_router(("step", f"d{d}", output))

    def drop_output(self, d: int) -> None:
        """Lose a worker's next output."""
        self._is_lossy = True
        self._outputs[d] = self._outputs[d][1:]

    def break_session(self, d: int) -> None:
        """Both ends lose the session; what is under way is lost."""
        self._orders[d] = self._outputs[d] = ()
        self._sessions[d] = -1 - self._sessions[d]
        self.tell_service(d, ("lose",))
        self.tell_router(("session", f"d{d}", False))

    def reconnect(self, d: int) -> None:
        """The router opens a new session."""
        self._sessions[d] = -self._sessions[d]
        self.tell_service(d, ("open",))
        self.tell_router(("session", f"d{d}", True))

    # ------------------------------------------------------------------ deaths

    def kill_decode(self, d: int, kind: int) -> None:
        """A decode worker dies: its tasks and blocks are gone."""
        self._dead_d[d] = kind
        self._orders[d] = ()
        for place, task in enumerate(self._tasks):
            if task is None or task.decode != d or task.task == GONE:
                continue
            self._set(place, task=GONE, stage="", blocks=(), units=0, writes=(), emitted=0)
            for k, stream in enumerate(task.links):
                if stream is not None:
                    end = 1 if kind == 1 and stream.up_end == 0 else stream.up_end
                    self._set_link(place, k, is_heard=False, down=(), up_end=end)

    def lose_decode(self, d: int) -> None:
        """The router notices."""
        self._dead_d[d] += 10
        self.tell_router(("session", f"d{d}", False))

    def kill_prefill(self, p: int, kind: int) -> None:
        """A prefill worker dies."""
        self._dead_p[p] = kind
        for place, task in enumerate(self._tasks):
            for k, stream in enumerate(() if task is None else task.links):
                if stream is not None and stream.prefill == p and stream.job != GONE:
                    end = 1 if kind == 1 and stream.down_end == 0 else stream.down_end
                    self._set_link(place, k, job=GONE, stage="", blocks=(), up=(), down_end=end)

    def lose_prefill(self, p: int) -> None:
        """The router notices."""
        self._dead_p[p] += 10
        self.tell_router(("session", f"p{p}", False))

    # ------------------------------------------------------------------ a decode worker's task and engine

    def tell_task(self, place: int, event: tuple[Any, ...]) -> None:
        """Give a task an event, and carry out its actions; the engine's answers follow."""
        task = self._task(place)
        if task.task == GONE:
            return
        number, actions = self._c.tasks[len(task.peers), task.resumed].step(task.task, event)
        self._set(place, task=number)
        answers: list[Any] = []
        for action in actions:
            if type(action) is tuple:
                self._act(place, action)
            else:
                answers += self._command(place, action)
        for answer in answers:
            if self._tasks[place] is not None:
                self.tell_task(place, ("engine", answer))

    def _act(self, place: int, action: tuple[Any, ...]) -> None:
        task = self._task(place)
        match action:
            case ("connect", peer):
                prefill = task.peers[peer]
                dead = self._dead_p[prefill] % 10
                stream = Link(prefill, job=GONE if dead else UNOPENED, down_end=1 if dead == 1 else 0)
                self._set(place, links=(*task.links, stream))
            case ("send", k, envelope):
                if task.links[k] is not None and self._link(place, k).job != GONE:
                    self._set_link(place, k, up=(*self._link(place, k).up, self._c.number(envelope)))
            case ("close", k, _):
                if task.links[k] is not None:
                    end = self._link(place, k).up_end or 1
                    self._set_link(place, k, is_heard=False, down=(), up_end=end)
            case ("write", start, _):
                self._write(place, start // UNIT_TOKENS)
            case ("says", output):
                if self._sessions[task.decode] == task.session:
                    said = _renamed(output, f"r{task.request}", task.epoch)
                    self._outputs[task.decode] = (*self._outputs[task.decode], self._c.number(said))
            case ("ended",):
                self._set(place, task=GONE)
                self.tell_service(task.decode, ("ended", _name_of(task.request), task.epoch))

    def _write(self, place: int, unit: int) -> None:
        task = self._task(place)
        if _ends_by_itself(task):
            return
        if task.stage != "bound" or len(task.blocks) != NEEDED:
            raise Violation("K3", f"block {unit} is written while its sequence is {task.stage or 'over'}")
        if task.units >> unit & 1 or unit in task.writes:
            raise Violation("K4", f"block {unit} is written twice")
        self._set(place, writes=(*task.writes, unit))

    def _command(self, place: int, command: Any) -> list[Any]:
        """Carry out a command of a task; returns the events that follow at once."""
        task = self._task(place)
        key = command.key
        if _ends_by_itself(task):
            return []
        match command:
            case link.Submit():
                self._set(place, stage="promised" if command.source is link.Source.PEER else "local")
                return [link.Promised(key, 0)]
            case link.Bind():
                if task.stage != "promised":
                    raise Violation("K2", f"bind is asked for while the sequence is {task.stage or 'over'}")
                self._set(place, stage="asked" if self._c.scope.is_crowded else "waits")
                if self._c.scope.is_crowded:
                    return []
                return [link.Bound(key)] if self._take_room(place) else [link.NotYet(key)]
            case link.KvComplete():
                if task.stage != "bound" or task.units != ALL_UNITS or task.writes:
                    raise Violation("K2", f"complete with blocks {task.units:b} while it is {task.stage or 'over'}")
                self._set(place, stage="decodes", emitted=task.resumed + 1)
            case link.PrefillLocally(_, kept, first):
                kept_units = (1 << -(-kept // UNIT_TOKENS)) - 1
                if task.stage not in ("promised", "asked", "waits", "bound") or kept_units & ~task.units:
                    raise Violation("K2", f"{kept} tokens are kept of blocks {task.units:b}, stage {task.stage}")
                emitted = task.resumed + (first is not None)
                self._set(place, stage="local", writes=(), units=kept_units, emitted=emitted)
            case link.CancelSequence(_, reason):
                if task.stage and task.stage != "cancelled":
                    self._set(place, stage="cancelled", writes=(), reason=reason)
            case _:
                raise Violation("crash", f"{command} is no command of a decode task")
        return []

    def _take_room(self, place: int) -> bool:
        """Bind blocks, if there are enough."""
        task = self._task(place)
        taken = {block for t in self._tasks if t is not None and t.decode == task.decode for block in t.blocks}
        free = [block for block in range(POOL) if block not in taken]
        if len(free) < NEEDED:
            return False
        self._set(place, stage="bound", blocks=tuple(free[:NEEDED]))
        return True

    def put_off(self, place: int) -> None:
        """There is no room now."""
        self._set(place, stage="waits")
        self.tell_task(place, ("engine", link.NotYet(_DECODE_KEY)))

    def bind(self, place: int) -> None:
        """Room is there now."""
        if not self._take_room(place):
            self.put_off(place)
            return
        self.tell_task(place, ("engine", link.Bound(_DECODE_KEY)))

    def store(self, place: int) -> None:
        """A write is carried out."""
        task = self._task(place)
        unit = task.writes[0]
        self._set(place, writes=task.writes[1:], units=task.units | 1 << unit)
        count = min(UNIT_TOKENS, PROMPT_TOKENS + task.resumed - unit * UNIT_TOKENS)
        self.tell_task(place, ("engine", link.KvWritten(_DECODE_KEY, unit * UNIT_TOKENS, count)))

    def finish(self, place: int) -> None:
        """All tokens that are missing are generated."""
        first = self._task(place).emitted
        self._set(place, reason=FinishReason.LENGTH)
        news = link.TokenNews(_DECODE_KEY, first, TOKENS[first:])
        self.tell_task(place, ("engine", link.StepTokens(0, (news,))))
        self.end_sequence(place)

    def expire_sequence(self, place: int) -> None:
        """The engine's clock ends the sequence."""
        if self._tasks[place] is not None and self._task(place).stage not in ("", "cancelled"):
            self._set(place, stage="cancelled", writes=(), reason=FinishReason.ERROR)

    def end_sequence(self, place: int) -> None:
        """The sequence is over, and its blocks are free."""
        reason = self._task(place).reason
        code = DeadlineExceeded.code if reason is FinishReason.ERROR else ""
        self._set(place, stage="", blocks=(), units=0, writes=(), emitted=0, reason=FinishReason.CANCELLED)
        self.tell_task(place, ("engine", link.Ended(_DECODE_KEY, reason, code, code)))

    # ------------------------------------------------------------------ a prefill worker's job and engine

    def tell_job(self, place: int, k: int, event: tuple[Any, ...]) -> None:
        """Give a job an event, and carry out its actions; the engine's answers follow."""
        stream = self._link(place, k)
        if stream.job == GONE:
            return
        number, actions = self._c.job.step(max(stream.job, 0), event)
        self._set_link(place, k, job=number)
        answers: list[tuple[Any, ...]] = []
        is_closed = False
        for action in actions:
            match action:
                case ("send", _, envelope):
                    stream = self._link(place, k)
                    if stream.is_heard:
                        self._set_link(place, k, down=(*stream.down, self._c.number(envelope)))
                case ("close", _, _):
                    is_closed = True
                case _:
                    answers += self._job_command(place, k, action)
        for answer in answers:
            self.tell_job(place, k, answer)
        if is_closed:
            stream = self._link(place, k)
            if stream.stage:
                raise Violation("K1", f"the stream is closed, and its sequence is {stream.stage}")
            self._set_link(place, k, job=GONE, up=(), down_end=stream.down_end or 1)

    def _job_command(self, place: int, k: int, command: Any) -> list[tuple[Any, ...]]:
        stream = self._link(place, k)
        key = command.key
        match command:
            case link.Submit():
                self._set_link(place, k, stage="queued" if self._c.scope.is_crowded else "offered")
                return [] if self._c.scope.is_crowded else [("engine", link.Offered(key, 0))]
            case link.PeerBound():
                if stream.stage not in ("offered", "parked"):
                    raise Violation("K2", f"decode has bound while the job is {stream.stage or 'over'}")
                self._set_link(place, k, stage="bound")
            case link.PeerNotYet():
                self._set_link(place, k, stage="parked")
            case link.ReadKv(_, start, count):
                if stream.stage and stream.stage != "computed":
                    raise Violation("K4", f"tokens {start}+{count} are read while the job is {stream.stage}")
                return [("read", start, count, bool(stream.stage))]
            case link.Release() | link.CancelSequence():
                is_live = bool(stream.stage)
                self._set_link(place, k, stage="", blocks=())
                reason = FinishReason.STOP if isinstance(command, link.Release) else FinishReason.CANCELLED
                return [("engine", link.Ended(key, reason))] if is_live else []
            case _:
                raise Violation("crash", f"{command} is no command of a job")
        return []

    def offer(self, place: int, k: int) -> None:
        """The job is next to run."""
        self._set_link(place, k, stage="offered")
        self.tell_job(place, k, ("engine", link.Offered(_JOB_KEY, 0)))

    def compute(self, place: int, k: int) -> None:
        """The prompt is computed, and its first token sampled."""
        prefill = self._link(place, k).prefill
        links = [s for t in self._tasks if t is not None for s in t.links if s is not None and s.prefill == prefill]
        taken = {block for stream in links for block in stream.blocks}
        free = [block for block in range(POOL) if block not in taken]
        self._set_link(place, k, stage="computed", blocks=tuple(free[:NEEDED]))
        resumed = self._task(place).resumed
        news = link.TokenNews(_JOB_KEY, resumed, TOKENS[resumed : resumed + 1])
        self.tell_job(place, k, ("engine", link.StepTokens(0, (news,))))
        self.tell_job(place, k, ("engine", link.Progress(_JOB_KEY, PROMPT_TOKENS + resumed)))

    # ------------------------------------------------------------------ streams

    def deliver_up(self, place: int, k: int) -> None:
        """The next message arrives at the prefill worker; the first one opens the job."""
        stream = self._link(place, k)
        envelope = self._c.values[stream.up[0]]
        self._set_link(place, k, up=stream.up[1:])
        if stream.job != UNOPENED:
            self.tell_job(place, k, ("hear", envelope))
        elif described(envelope) == "garbage":
            self._unopened(place, k)
        else:
            self.tell_job(place, k, ("open", envelope))

    def end_up(self, place: int, k: int) -> None:
        """Decode's direction ends."""
        self._set_link(place, k, up_end=2)
        if self._link(place, k).job == UNOPENED:
            self._unopened(place, k)
        else:
            self.tell_job(place, k, ("hear", None))

    def silent_job(self, place: int, k: int) -> None:
        """Nothing comes from decode for too long."""
        if self._link(place, k).job == UNOPENED:
            self._unopened(place, k)
        else:
            self.tell_job(place, k, ("silent",))

    def _unopened(self, place: int, k: int) -> None:
        """The stream's handler gives up before there is a job."""
        self._set_link(place, k, job=GONE, up=(), down_end=1)

    def deliver_down(self, place: int, k: int) -> None:
        """The next message arrives at the decode worker."""
        stream = self._link(place, k)
        self._set_link(place, k, down=stream.down[1:])
        envelope = self._c.values[stream.down[0]]
        if stream.is_rotten and self._c.name(stream.down[0]).startswith("frame"):
            envelope = _damaged(envelope)
        self.tell_task(place, ("hear", k, envelope))

    def end_down(self, place: int, k: int) -> None:
        """Prefill's direction ends."""
        self._set_link(place, k, down_end=2)
        self.tell_task(place, ("hear", k, None))

    def damage(self, place: int, k: int, is_up: bool, fault: str) -> None:
        """A fault of the message that arrives next."""
        stream = self._link(place, k)
        queue = stream.up if is_up else stream.down
        head, rest = queue[0], queue[1:]
        envelope = self._c.values[head]
        match fault:
            case "lost":
                queue = rest
            case "twice":
                queue = (head, *queue)
            case "swap":
                queue = (rest[0], head, *rest[1:])
            case "cut":
                queue = (self._c.number(envelope[: len(envelope) // 2]), *rest)
            case "bit":
                queue = (self._c.number(_damaged(envelope)), *rest)
            case "rot":
                self._set_link(place, k, is_rotten=True)
            case "older":
                queue = (self._c.number(_older(envelope)), *queue)
        self._set_link(place, k, **{"up" if is_up else "down": queue})


_DECODE_KEY = SequenceKey("r/d1", 0)
_JOB_KEY = SequenceKey("r/p1", 0)


def _ends_by_itself(task: Task) -> bool:
    """True if the engine ends a sequence and the task does not know it yet: its commands are void."""
    return task.stage == "cancelled" and task.reason is FinishReason.ERROR


def _name_of(request: int) -> str:
    """The router's name of a request."""
    return f"r{request}@1.{request + 1:x}"


def _renamed(output: bytes, request_id: str, epoch: int) -> bytes:
    """A task's output under its own request and epoch, without reports that decide nothing."""
    step = worker_pb2.StepOutput.FromString(output)
    parts: list[Any] = [*step.taken, *step.tokens, *step.ends]
    for part in parts:
        part.request_id = _name_of(int(request_id[1:]))
        part.epoch.incarnation, part.epoch.counter = 1, epoch
    for end in step.ends:
        end.ClearField("timeline")
        end.ClearField("handover")
    return step.SerializeToString()


def _damaged(envelope: bytes) -> bytes:
    """The frame with one bit of its planes flipped."""
    return envelope[:-1] + bytes([envelope[-1] ^ 1])


def _older(envelope: bytes) -> bytes:
    """The same message of an older dispatch; a frame has that dispatch's KV."""
    try:
        message = decode_envelope(envelope)
    except WireError:
        return envelope
    if isinstance(message, Frame):
        header = message.header
        return older_frame(header.sequence, header.token_start, header.token_count)
    copy = type(message).FromString(message.SerializeToString())
    copy.epoch.counter = OLDER.counter
    return encode_message(copy)


def described(envelope: bytes) -> str:
    """Short description of a message on a stream."""
    try:
        message = decode_envelope(envelope)
    except WireError:
        return "garbage"
    if isinstance(message, Frame):
        return f"frame #{message.header.sequence} {message.header.token_start}+{message.header.token_count}"
    return f"{message.WhichOneof('body')} #{message.sequence}"
