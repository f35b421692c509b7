"""A worker process in virtual time: one engine, both production faces' decisions, and its news for the routers.

Decode orders go through the production service, run, outbox and choice; hand-overs through the production machines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, cast

from ..core.errors import Overloaded, TwostrokeError, Unavailable
from ..core.request import Role, SequenceKey
from ..decode_worker.choice import Choice
from ..decode_worker.order import order_from_wire
from ..decode_worker.outbox import Outbox
from ..decode_worker.pull import Pull, PullTools
from ..decode_worker.run import Run, RunTools
from ..decode_worker.service import DecodeService
from ..decode_worker.session import Session
from ..kv.handover import Label
from ..kv.handover_receiver import Receiver
from ..kv.handover_sender import Sender, refuse
from ..kv.keys import Namer
from ..kv.messages import error_to_wire, sampling_from_wire
from ..kv.transport import Channels
from ..kv.wire import WireError, decode_envelope, encode_message
from ..model import link
from ..model.dispatch import Dispatcher, Owner, SequenceEvent
from ..model.facts import FaceFacts, ModelFacts
from ..protos import common_pb2, handover_pb2, worker_pb2
from ..router import facts as router_facts
from ..text.stream import TextPiece
from ..text.tokenizer import Tokenizer
from .engine import FINGERPRINT, IDENTITY_KEY, NUMERICS, Engine
from .faces import SessionFace, WatchFace
from .handovers import Machinery, Place, SimJob, SimPull, refused
from .invariants import Violation, check_drained
from .network import End, Network
from .setting import Setting, WorkerSetting
from .store import DIGEST_KEY, EOS, SPEC, VOCABULARY, Ledger
from .world import Process

MODEL = "model"
MAX_MODEL_LEN = 1 << 20
ORPHAN_SLACK_S = 0.5  # commands under way, and the step that must end first
PORT = 1  # of every worker: an order names its peers by host and port


class NoText:
    """Text of nothing: ids are all that is checked here."""

    is_stopped = False
    num_shown = 0

    def push(self, ids: Sequence[int]) -> TextPiece:
        """No text."""
        return TextPiece("", len(ids), False)

    def may_stop_at(self, token_id: int) -> bool:
        """No text, no stop string."""
        return False

    def flush(self) -> str:
        """No text."""
        return ""


class SimDispatcher(Dispatcher):
    """The production routing of events; an owner's trouble is ours, not a line in a log."""

    def _call(self, owner: Owner, event: SequenceEvent) -> None:
        owner(event)


class SimChoice(Choice):
    """The production rules of which tokens count, without a tokenizer."""

    def __init__(self, order_params: Any, emitted_ids: Sequence[int]) -> None:
        self._params = order_params
        self._eos_ids = frozenset([EOS])
        self._text = cast(Any, NoText())
        self.num_tokens = len(emitted_ids)
        self.ended = None


class SimRun(Run):
    """The production run; only its streams are ours."""

    connect: Callable[[Receiver, SequenceKey, Run, str], SimPull]

    def _open_pull(self, receiver: Receiver, address: str) -> Pull:
        return cast(Pull, self.connect(receiver, self.order.engine_key, self, address))


class SimService(DecodeService):
    """The production decode service; runs and timers are ours."""

    node: WorkerNode

    def _run_of(self, message: worker_pb2.Submit, outbox: Outbox) -> Run:
        order = order_from_wire(message, self._tools.facts.model)
        emitted = order.prompt_ids[len(order.prompt_ids) - order.num_emitted :]
        run = SimRun(order, SimChoice(order.params, emitted), outbox, self._tools, self._on_end)
        run.connect = self.node.connect_pull
        return run

    def open(self, session: Session) -> None:
        """A router said hello."""
        self._sessions[session] = set()

    def lose(self, session: Session, grace_s: float) -> None:
        """As `_lost`: its runs go on for the grace."""
        runs = self._sessions.pop(session, set())
        listed = [run for run in self._run_by_key.values() if run in runs]

        def end() -> None:
            for run in listed:
                if run in self._running:
                    run.cancel("router lost")
            self.node.world.after(ORPHAN_SLACK_S, self.node.process, check)

        def check() -> None:
            if any(run in self._running for run in listed):
                raise Violation("R7", f"{self.node.process}: requests of a lost router run on")

        self.node.world.after(grace_s, self.node.process, end)


class WorkerNode:
    """One life of one worker."""

    def __init__(
        self, network: Network, process: Process, worker: WorkerSetting, setting: Setting, ledger: Ledger
    ) -> None:
        world = network.world
        self.world, self.network, self.process = world, network, process
        self.worker, self.setting = worker, setting
        self.engine = Engine(world, process, setting, worker, ledger)
        self.dispatcher = SimDispatcher(self.engine)
        self.engine.tell = self._tell
        self.facts = _face_facts(worker)
        self.session_timing = cast(Any, None)  # our own timers watch the session
        pull = PullTools(self.dispatcher, cast(Executor, None), DIGEST_KEY, SPEC, setting.timing, world, Counter())
        self.service = SimService(RunTools(self.facts, pull, cast(Channels, None)), cast(Tokenizer, None))
        self.service.node = self
        self.sessions: list[SessionFace] = []
        self.watches: list[WatchFace] = []
        self.jobs: list[SimJob] = []
        self.find: Callable[[str], WorkerNode | None] = lambda _: None  # by worker id, whoever lives there now
        self._num_jobs = 0
        self._place = Place(world, process, self.dispatcher, setting.is_bearable)
        self._orphans: dict[SequenceKey, float] = {}  # sequences whose hand-over ended, and when
        self.dispatcher.on_cache(self._on_cache)

    @property
    def is_idle(self) -> bool:
        """Nothing runs, nothing waits."""
        return not (self.engine.num_live or self.jobs or self.service.num_running or self.dispatcher.num_owned)

    # ------------------------------------------------------------------ what routers open

    def accept(self, end: End, message: worker_pb2.SessionUp | worker_pb2.WatchRequest) -> None:
        """The first message of a router's stream says what it is to be."""
        if isinstance(message, worker_pb2.WatchRequest):
            self.watches.append(WatchFace(self, end))
        elif message.HasField("hello"):
            session = SessionFace(self, end)
            self.sessions.append(session)
            session.hear(message)
        else:
            end.abort()  # its first word was lost

    def info(self) -> common_pb2.WorkerInfo:
        """What a welcome carries; the router knows our facts by heart."""
        return common_pb2.WorkerInfo(worker_id=self.worker.worker_id, incarnation=self.process.life)

    def router_facts(self) -> router_facts.WorkerFacts:
        """What an announcement says."""
        worker = self.worker
        return router_facts.WorkerFacts(
            worker_id=worker.worker_id,
            incarnation=self.process.life,
            role=worker.role,
            address=f"{worker.worker_id}:{PORT}",
            model=ROUTER_MODEL,
            num_kv_blocks=worker.num_blocks,
            block_tokens=worker.block_tokens,
            max_num_seqs=worker.limits.max_num_seqs,
            max_batch_tokens=worker.limits.max_batch_tokens,
        )

    # ------------------------------------------------------------------ hand-overs

    def connect_pull(self, receiver: Receiver, key: SequenceKey, owner: Run, address: str) -> SimPull:
        """The decode side opens a stream to whoever lives at the address."""
        peer = self.find(address.removesuffix(f":{PORT}"))
        assert peer is not None, address
        near, far = self.network.connect(self.process, peer.process, f"{key.request_id}>{address}")
        if peer.process.is_alive:
            far.on_message = lambda envelope: peer.accept_handover(far, envelope)
        return SimPull(receiver, near, key, owner, self._place)

    def accept_handover(self, end: End, envelope: bytes) -> None:
        """The first message of a hand-over: prefill_worker/service.py's judgement."""
        try:
            message = decode_envelope(envelope)
        except WireError:
            end.abort()
            return
        if not isinstance(message, handover_pb2.HandoverUp):
            end.abort()
            return
        try:
            job = self._job(message, end)
        except TwostrokeError as error:
            self.world.note(self.process, refused(error))
            end.send(encode_message(refuse(message, error_to_wire(error))))
            end.finish()
            end.is_deaf = True
            return
        self.jobs.append(job)
        job.start()

    def _job(self, message: handover_pb2.HandoverUp, end: End) -> SimJob:
        if self.worker.role is Role.COMBINED:
            raise Unavailable("this worker is combined", retry_after_s=1.0)
        if len(self.jobs) >= self.worker.max_handovers:
            raise Overloaded(f"{len(self.jobs)} hand-overs are under way", retry_after_s=1.0)
        now_s, worker = self.world.now_s(), self.worker
        sender = Sender(message, worker.frame_tokens, worker.frame_slots, self.setting.timing, now_s)
        order, label = sender.order, Label.of(message)
        prompt_ids = tuple(order.prompt_ids)
        self.facts.model.check_prompt(prompt_ids)
        names = self.facts.namer.name(prompt_ids, order.isolation_domain, order.adapter)
        self._num_jobs += 1
        submit = link.Submit(
            key=SequenceKey(f"{label.request_id}/p{self._num_jobs}", label.choice),
            source=link.Source.FOR_PEER,
            prompt_ids=prompt_ids,
            identities=names.identities,
            identity_root=names.root,
            params=sampling_from_wire(order.sampling),
            num_emitted=order.emitted_tokens,
            peer_held_tokens=order.held_tokens,
            deadline_s=now_s + order.timeout_ms / 1000,
        )
        return SimJob(sender, submit, end, self._place, self._job_over)

    def _job_over(self, job: SimJob) -> None:
        self.jobs.remove(job)
        self._orphans[job.submit.key] = self.world.now_s()

    # ------------------------------------------------------------------ inside

    def _tell(self, events: Sequence[link.Event]) -> None:
        """Route what the engine says, then let what it caused leave."""
        for event in events:
            self.dispatcher._route(event)
        self.flush()

    def flush(self) -> None:
        """Let everything that waits for routers leave."""
        for session in list(self.sessions):
            session.flush()

    def _on_cache(self, event: link.CacheDelta | link.CacheSnapshot) -> None:
        for watch in list(self.watches):
            watch.hear_cache(event)

    def check(self) -> None:
        """What must hold after every event: the engine's invariants, and R6 inside one worker."""
        self.engine.check()
        speaking = [run.order.key for run in self.service._running if run._verdict is None]
        if len(speaking) != len(set(speaking)):
            raise Violation("R6", f"{self.process}: two epochs of one request speak: {sorted(speaking)}")

        for machine in (*self.jobs, *(run._pull for run in self.service._running)):
            if isinstance(machine, Machinery):
                machine.check()
        self._check_orphans()

    def _check_orphans(self) -> None:
        """What nobody waits for any more is given up now, not at its deadline."""
        if not self._orphans:
            return
        states, slack_s = self.engine.core.states(), ORPHAN_SLACK_S + self.process.frozen_s
        for key, since_s in list(self._orphans.items()):
            if key not in states and not self.engine.has_waiting_commands:
                del self._orphans[key]
            elif self.world.now_s() - since_s > slack_s:
                raise Violation("R7", f"{self.process}: {key} lives {slack_s} s after its hand-over ended")

    def check_drained(self) -> None:
        """K1 at the end, and that no machine is left behind."""
        check_drained(str(self.process), self.engine.core, self.engine.pool)
        if self.jobs or self.service.num_running or self.dispatcher.num_owned:
            raise Violation("K1", f"{self.process}: jobs or runs are left: {[job.name for job in self.jobs]}")


ROUTER_MODEL = router_facts.ModelFacts(
    name=MODEL,
    weights_fingerprint=FINGERPRINT,
    numerics_class=NUMERICS,
    numerics_description="",
    max_model_len=MAX_MODEL_LEN,
    vocab_size=VOCABULARY,
    deterministic=True,
    path="",
    kv_bytes_per_token=SPEC.bytes_per_token,
    kv_bf16_bytes_per_token=SPEC.bf16_bytes_per_token,
)


def _face_facts(worker: WorkerSetting) -> FaceFacts:
    model = ModelFacts(
        name=MODEL,
        directory="",
        vocab_size=VOCABULARY,
        max_model_len=MAX_MODEL_LEN,
        eos_ids=frozenset([EOS]),
        weights_fingerprint=FINGERPRINT,
        numerics_class=NUMERICS,
        numerics_description="",
        deterministic=True,
        kv_spec=SPEC,
    )
    return FaceFacts(
        worker_id=worker.worker_id,
        model=model,
        namer=Namer(IDENTITY_KEY, FINGERPRINT, NUMERICS),
        digest_key=DIGEST_KEY,
        num_blocks=worker.num_blocks,
        block_tokens=worker.block_tokens,
        frame_bytes=worker.frame_tokens * SPEC.bytes_per_token,
        frame_slots=worker.frame_slots,
        max_num_seqs=worker.limits.max_num_seqs,
        max_batch_tokens=worker.limits.max_batch_tokens,
    )
