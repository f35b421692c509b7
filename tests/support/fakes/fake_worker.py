"""A worker as the protocol sees it: real grpc.aio server, deterministic tokens, and every misbehaviour on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc.aio

from twostroke.core.guard import Guard
from twostroke.core.inside import InsideChannel
from twostroke.core.request import Role
from twostroke.kv.messages import role_to_wire, spec_to_wire
from twostroke.kv.spec import attention_spec
from twostroke.protos import common_pb2, worker_pb2, worker_pb2_grpc

MODEL = "tiny"
FINGERPRINT = b"f" * 16
PROOF_KEY = b"p" * 32


def token_at(prompt: list[int], choice: int, index: int) -> int:
    """The token every honest worker gives."""
    return (sum(prompt) + 31 * choice + 7 * index) % 997


@dataclass
class Behaviour:
    """What the worker does; changed by tests at any time."""

    token_s: float = 0.001
    hold_first: asyncio.Event | None = None  # no token before it is set
    stop_after: int | None = None  # no token from this index on (the request hangs)
    stale_tokens: bool = False  # before each token one of an older epoch
    repeat_tokens: bool = False
    skip_index: int | None = None
    refuse: common_pb2.Error | None = None
    refuse_choice: int | None = None  # this one alone is refused, as if there were no room
    mute: bool = False  # says nothing at all, as if frozen
    mute_session: bool = False  # its session alone is stuck
    welcome_as: int | None = None  # another incarnation answers at the address
    end_twice: bool = False
    bytes_moved: int = 0
    guesses: int = 0  # right ones of each choice; thrice as many were made
    local_reason: str = ""  # why it computes prompts itself, although it was given a peer


@dataclass
class FakeWorker:
    worker_id: str
    role: Role = Role.COMBINED
    incarnation: int = 1
    deterministic: bool = True
    kv_blocks: int = 1000
    behaviour: Behaviour = field(default_factory=Behaviour)
    held: list[bytes] = field(default_factory=list)
    load: dict[str, Any] = field(default_factory=dict)
    proof_key: bytes = PROOF_KEY

    def __post_init__(self) -> None:
        self.submits: list[worker_pb2.Submit] = []
        self.cancels: list[worker_pb2.CancelRequest] = []
        self.beats_heard = 0
        self.running: dict[tuple[str, int], asyncio.Task[None]] = {}
        self.sessions: set[asyncio.Queue[worker_pb2.SessionDown | None]] = set()
        self.watchers: set[asyncio.Queue[worker_pb2.WatchEvent]] = set()
        self.num_watches = 0
        self.server: grpc.aio.Server | None = None
        self.address = ""
        self._announcing: asyncio.Task[None] | None = None
        self._announcing_also: asyncio.Task[None] | None = None
        self.leaving = False
        self.refuses_sessions = False
        self.guards: list[grpc.aio.ServerInterceptor] = [Guard(self.proof_key, self.worker_id)]

    # -------------------------------------------------------------- life

    async def start(self, announce_to: str, port: int = 0) -> FakeWorker:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)], interceptors=self.guards)
        worker_pb2_grpc.add_WorkerServicer_to_server(_Servicer(self), self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()
        self._announcing = asyncio.create_task(self._announce(announce_to))
        return self

    async def announce_also(self, address: str) -> None:
        """To a second router."""
        self._announcing_also = asyncio.create_task(self._announce(address))

    async def die(self) -> None:
        """As kill -9: every stream breaks at once."""
        announcing = [task for task in (self._announcing, self._announcing_also) if task is not None]
        running = [*self.running.values(), *announcing]
        while running:  # a call that fails at the same moment raises its error, and the task goes on
            for task in running:
                task.cancel()
            _, left = await asyncio.wait(running, timeout=0.5)
            running = list(left)
        if self.server is not None:
            await self.server.stop(None)
            self.server = None

    def info(self) -> common_pb2.WorkerInfo:
        model = common_pb2.ModelInfo(
            name=MODEL,
            weights_fingerprint=FINGERPRINT,
            numerics_class=b"n" * 16,
            max_model_len=4096,
            vocab_size=1000,
            kv_spec=spec_to_wire(attention_spec(2, 2, 64, 1)),
            deterministic=self.deterministic,
            path="/nowhere",
        )
        return common_pb2.WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=role_to_wire(self.role),
            address=self.address,
            model=model,
            num_kv_blocks=self.kv_blocks,
            block_tokens=16,
            max_num_seqs=16,
            max_batch_tokens=2048,
            pid=4242,
        )

    async def _announce(self, address: str) -> None:
        while True:
            try:
                async with InsideChannel(address, self.proof_key) as channel:
                    stub = worker_pb2_grpc.AnnounceStub(channel)
                    call = stub.Announce()
                    sequence = 0
                    while True:
                        sequence += 1
                        if not self.behaviour.mute:
                            worker = self.info() if sequence == 1 else None
                            await call.write(
                                worker_pb2.Announcement(worker=worker, leaving=self.leaving, sequence=sequence)
                            )
                            assert await call.read()
                        await asyncio.sleep(0.1)
            except (grpc.RpcError, grpc.aio.InternalError, AssertionError):
                await asyncio.sleep(0.05)

    # -------------------------------------------------------------- events

    def break_sessions(self) -> None:
        """Sessions end now and none can be opened any more; the worker still announces itself."""
        self.refuses_sessions = True
        for queue in self.sessions:
            queue.put_nowait(None)

    def say(self, message: worker_pb2.SessionDown) -> None:
        for queue in self.sessions:
            queue.put_nowait(message)

    def report(self) -> worker_pb2.LoadReport:
        values = {"total_blocks": self.kv_blocks, "free_blocks": self.kv_blocks, "phase": "idle", **self.load}
        return worker_pb2.LoadReport(role=role_to_wire(self.role), **values)

    def push_load(self) -> None:
        for queue in self.watchers:
            queue.put_nowait(worker_pb2.WatchEvent(incarnation=self.incarnation, load=self.report()))

    def push_delta(self, stored: list[bytes], sequence: int) -> None:
        event = worker_pb2.WatchEvent(incarnation=self.incarnation, sequence=sequence)
        event.delta.stored = b"".join(stored)
        for queue in self.watchers:
            queue.put_nowait(event)

    # -------------------------------------------------------------- work

    def take(self, order: worker_pb2.Submit) -> None:
        self.submits.append(order)
        key = (order.request_id, order.choice)
        self.running[key] = asyncio.create_task(self._generate(order))

    def cancel(self, order: worker_pb2.CancelRequest) -> None:
        self.cancels.append(order)
        for key, task in list(self.running.items()):
            if key[0] == order.request_id:
                task.cancel()
                del self.running[key]

    async def _generate(self, order: worker_pb2.Submit) -> None:
        how = self.behaviour
        key = (order.request_id, order.choice)
        if order.choice == how.refuse_choice:
            full = common_pb2.Error(code="overloaded", message="full", retry_after_ms=100)
            self._end(order, common_pb2.FINISH_REASON_ERROR, 0, error=full)
            return
        if how.refuse is not None:
            self._end(order, common_pb2.FINISH_REASON_ERROR, 0, error=how.refuse)
            return
        if how.hold_first is not None:
            await how.hold_first.wait()
        count = order.sampling.max_tokens
        for index in range(order.emitted_tokens, count):
            if how.stop_after is not None and index >= how.stop_after:
                await asyncio.Event().wait()
            if how.token_s:
                await asyncio.sleep(how.token_s)
            if index == how.skip_index:
                continue
            self._tokens(order, index)
        self.running.pop(key, None)
        self._end(order, common_pb2.FINISH_REASON_LENGTH, count)
        if how.end_twice:
            self._end(order, common_pb2.FINISH_REASON_LENGTH, count)

    def _tokens(self, order: worker_pb2.Submit, index: int) -> None:
        asked = list(order.prompt_ids[: len(order.prompt_ids) - order.emitted_tokens])
        token = token_at(asked, order.choice, index)
        output = worker_pb2.TokenOutput(
            request_id=order.request_id,
            choice=order.choice,
            epoch=order.epoch,
            first_index=index,
            token_ids=[token],
            text=f"{token} ",
        )
        message = worker_pb2.SessionDown()
        if self.behaviour.stale_tokens:
            stale = message.step.tokens.add()
            stale.CopyFrom(output)
            stale.epoch.counter -= 1
            stale.token_ids[0] = 998
        message.step.tokens.add().CopyFrom(output)
        if self.behaviour.repeat_tokens:
            message.step.tokens.add().CopyFrom(output)
        self.say(message)

    def _end(
        self,
        order: worker_pb2.Submit,
        reason: common_pb2.FinishReason.ValueType,
        count: int,
        error: common_pb2.Error | None = None,
    ) -> None:
        peer = order.prefill_peers[0].worker_id if order.prefill_peers else ""
        message = worker_pb2.SessionDown()
        message.step.ends.add(
            request_id=order.request_id,
            choice=order.choice,
            epoch=order.epoch,
            reason=reason,
            error=error,
            usage=common_pb2.Usage(
                prompt_tokens=len(order.prompt_ids) - order.emitted_tokens,
                completion_tokens=count,
                cached_tokens=16 * order.choice,
                draft_tokens=3 * self.behaviour.guesses,
                accepted_tokens=self.behaviour.guesses,
                proposer="ngram" if self.behaviour.guesses else "",
            ),
            timeline=[
                common_pb2.Instant(name="received", since_seen_ns=0),
                common_pb2.Instant(name="first_token", since_seen_ns=1_000_000),
            ],
            handover=worker_pb2.HandoverReport(
                prefill_worker="" if self.behaviour.local_reason else peer,
                local_reason=self.behaviour.local_reason if peer else "ordered",
                transport="grpc" if peer else "none",
                bytes_moved=self.behaviour.bytes_moved,
                bytes_as_bf16=2 * self.behaviour.bytes_moved,
            ),
            tail_text=".",
        )
        self.say(message)


class _Servicer(worker_pb2_grpc.WorkerServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Session(
        self, request_iterator: AsyncIterator[worker_pb2.SessionUp], context: Any
    ) -> AsyncIterator[worker_pb2.SessionDown]:
        worker = self._worker
        if worker.refuses_sessions:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no sessions now")
        out: asyncio.Queue[worker_pb2.SessionDown | None] = asyncio.Queue()
        hello = await anext(aiter(request_iterator))
        assert hello.WhichOneof("body") == "hello"
        welcome = worker_pb2.SessionDown(sequence=1, welcome=worker.info())
        welcome.welcome.incarnation = worker.behaviour.welcome_as or worker.incarnation
        yield welcome
        reader = asyncio.create_task(self._read(request_iterator))
        worker.sessions.add(out)
        sequence = 1
        try:
            while True:
                sequence += 1
                try:
                    message = await asyncio.wait_for(out.get(), 0.1)
                except TimeoutError:
                    message = worker_pb2.SessionDown(beat=worker_pb2.Beat(phase="idle", steps=sequence))
                if message is None:
                    return
                while worker.behaviour.mute or worker.behaviour.mute_session:
                    await asyncio.sleep(0.02)
                message.sequence = sequence
                yield message
        finally:
            worker.sessions.discard(out)
            reader.cancel()

    async def _read(self, requests: AsyncIterator[worker_pb2.SessionUp]) -> None:
        async for message in requests:
            match message.WhichOneof("body"):
                case "submit":
                    self._worker.take(message.submit)
                case "cancel":
                    self._worker.cancel(message.cancel)
                case "beat":
                    self._worker.beats_heard += 1

    async def Watch(self, request: worker_pb2.WatchRequest, context: Any) -> AsyncIterator[worker_pb2.WatchEvent]:
        worker = self._worker
        worker.num_watches += 1
        out: asyncio.Queue[worker_pb2.WatchEvent] = asyncio.Queue()
        worker.watchers.add(out)
        snapshot = worker_pb2.BlocksSnapshot(identities=b"".join(worker.held), last=True)
        try:
            yield worker_pb2.WatchEvent(incarnation=worker.incarnation, sequence=1, snapshot=snapshot)
            yield worker_pb2.WatchEvent(incarnation=worker.incarnation, load=worker.report())
            while True:
                yield await out.get()
        finally:
            worker.watchers.discard(out)

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> common_pb2.WorkerInfo:
        return self._worker.info()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        return worker_pb2.DrainResponse(empty=True)


def reborn(worker: FakeWorker) -> FakeWorker:
    """The same worker's next life."""
    return replace(worker, incarnation=worker.incarnation + 1, behaviour=Behaviour())
