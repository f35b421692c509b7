"""Real workers on loopback around a tiny random Llama, and a hand that speaks to them as a router does."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from twostroke.checkpoint.config import ModelConfig
from twostroke.core.inside import InsideChannel
from twostroke.core.request import Role
from twostroke.core.tls.callers import Caller
from twostroke.core.tls.identity import TlsIdentity
from twostroke.engine.config import StepConfig
from twostroke.kv.config import CacheConfig
from twostroke.kv.handover.transports.grpc import CHANNEL_OPTIONS
from twostroke.kv.keys import proof_key
from twostroke.protos import common_pb2, worker_pb2, worker_pb2_grpc
from twostroke.worker.process import WorkerProcess
from twostroke.worker.settings import WorkerSettings

VOCAB = 260  # 256 bytes and four special tokens
EOS = 257
CLUSTER_KEY = "a key of the tests"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer, as a Hugging Face directory."""
    import tokenizers
    import torch
    from safetensors.torch import save_file
    from tokenizers import decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("tiny-worker")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(11)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) * 0.2

    weights = {"model.embed_tokens.weight": weight(VOCAB, 64), "model.norm.weight": torch.ones(64)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{norm}.weight"] = torch.ones(64)
        for part, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            weights[f"{name}.self_attn.{part}_proj.weight"] = weight(rows, 64)
        for part, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            weights[f"{name}.mlp.{part}_proj.weight"] = weight(*shape)
    save_file(weights, directory / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: place for place, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<a>", "<b>"])
    backend.save(str(directory / "tokenizer.json"))
    return directory


Start = Callable[..., Awaitable[WorkerProcess]]


@pytest.fixture
async def start_worker(tiny_checkpoint: Path) -> AsyncIterator[Start]:
    """Start workers; all are stopped at the test's end, and none may have kept a block."""
    workers: list[WorkerProcess] = []

    async def start(role: Role, **changes: Any) -> WorkerProcess:
        clock, nvml = changes.pop("clock", None), changes.pop("nvml", None)
        settings = WorkerSettings(
            worker_id=changes.pop("worker_id", f"{role.value}-{len(workers)}"),
            role=role,
            model_directory=(directory := changes.pop("model_directory", str(tiny_checkpoint))),
            model_name="tiny",
            model=ModelConfig(path=directory, **changes.pop("model", {})),
            cache=changes.pop("cache", CacheConfig(tokens=8192, frame_bytes=8192)),
            step=changes.pop("step", StepConfig(max_num_batched_tokens=64)),
            cluster_key=CLUSTER_KEY,
            orphan_grace_s=changes.pop("orphan_grace_s", 0.3),
            **changes,
        )
        worker = WorkerProcess(settings, clock, nvml=nvml)
        workers.append(worker)
        await worker.start()
        return worker

    yield start
    await asyncio.gather(*(worker.stop(0.0) for worker in workers))


@dataclass
class Answer:
    """What a router heard of one choice."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ends: list[worker_pb2.RequestEnd] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def end(self) -> worker_pb2.RequestEnd:
        """The one end."""
        assert len(self.ends) == 1, self.ends
        return self.ends[0]

    async def until(self, condition: Callable[["Answer"], bool], timeout_s: float = 120.0) -> "Answer":
        """Wait until something holds."""

        async def wait() -> None:
            while not condition(self):
                self.changed.clear()
                await self.changed.wait()

        await asyncio.wait_for(wait(), timeout_s)
        return self

    async def ended(self, timeout_s: float = 120.0) -> "Answer":
        """Wait for the end."""
        return await self.until(lambda answer: bool(answer.ends), timeout_s)


class RouterHand:
    """One session with one worker."""

    def __init__(
        self, address: str, incarnation: int = 7, router_id: str = "hand", tls: TlsIdentity | None = None
    ) -> None:
        self.incarnation = incarnation
        self.router_id = router_id
        self.answers: dict[tuple[str, int], Answer] = {}
        self.messages: list[worker_pb2.SessionDown] = []
        self.welcome: common_pb2.WorkerInfo | None = None
        self._channel = InsideChannel(
            address, proof_key(CLUSTER_KEY), [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)], tls
        )
        self.stub: Any = worker_pb2_grpc.WorkerStub(self._channel)
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "RouterHand":
        self._call = self.stub.Session()
        await self._call.write(
            worker_pb2.SessionUp(
                sequence=1,
                hello=worker_pb2.SessionHello(router_id=self.router_id, router_incarnation=self.incarnation),
            )
        )
        first = await self._call.read()
        self.welcome = first.welcome
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.lose()
        await self._channel.close()

    async def lose(self) -> None:
        """Be gone, without a word."""
        self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        peers: Sequence[WorkerProcess | worker_pb2.PrefillPeer | str] = (),
        **options: Any,
    ) -> Answer:
        """Order one choice."""
        sampling = {"max_tokens": 8, "temperature": 0.0, "seed": 1} | options.pop("sampling", {})
        choice, counter = options.pop("choice", 0), options.pop("counter", 1)
        answer = self.answers.setdefault((request_id, choice), Answer())
        order = worker_pb2.Submit(
            request_id=request_id,
            choice=choice,
            epoch=worker_pb2.Epoch(incarnation=self.incarnation, counter=counter),
            prompt_ids=prompt_ids,
            sampling=common_pb2.SamplingParams(**sampling),
            isolation_domain=options.pop("domain", "tests"),
            prefill_peers=[
                worker_pb2.PrefillPeer(
                    worker_id=peer.settings.worker_id, incarnation=peer.incarnation, address=peer.address
                )
                if isinstance(peer, WorkerProcess)
                else peer
                if isinstance(peer, worker_pb2.PrefillPeer)
                else worker_pb2.PrefillPeer(worker_id="elsewhere", incarnation=1, address=peer)
                for peer in peers
            ],
            timeout_ms=options.pop("timeout_ms", 60_000),
            **options,
        )
        await self._call.write(worker_pb2.SessionUp(submit=order))
        return answer

    async def cancel(self, request_id: str, counter: int = 1) -> None:
        """Cancel a request."""
        epoch = worker_pb2.Epoch(incarnation=self.incarnation, counter=counter)
        await self._call.write(
            worker_pb2.SessionUp(cancel=worker_pb2.CancelRequest(request_id=request_id, epoch=epoch, reason="test"))
        )

    async def say(self, message: worker_pb2.SessionUp) -> None:
        """Write any message."""
        await self._call.write(message)

    async def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            while isinstance(message := await self._call.read(), worker_pb2.SessionDown):
                self.messages.append(message)
                self._take(message.step)

    def _take(self, step: worker_pb2.StepOutput) -> None:
        for tokens in step.tokens:
            answer = self._answer(tokens)
            assert tokens.first_index == len(answer.token_ids), "a gap"
            assert not answer.ends, "tokens after the end"
            answer.token_ids += tokens.token_ids
            answer.text += tokens.text
            answer.changed.set()
        for end in step.ends:
            answer = self._answer(end)
            answer.text += end.tail_text
            answer.ends.append(end)
            answer.changed.set()

    def _answer(self, message: Any) -> Answer:
        return self.answers.setdefault((message.request_id, message.choice), Answer())


@pytest.fixture
async def router_of() -> AsyncIterator[Callable[[WorkerProcess], Awaitable[RouterHand]]]:
    """Open sessions with workers; closed at the test's end."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_session(worker: WorkerProcess, incarnation: int = 7, router_id: str = "hand") -> RouterHand:
            tls = TlsIdentity(worker.settings.tls, Caller.ROUTER) if worker.settings.tls else None
            return await stack.enter_async_context(RouterHand(worker.address, incarnation, router_id, tls))

        yield open_session


@pytest.fixture
async def hand_to() -> AsyncIterator[Callable[[str], Awaitable[RouterHand]]]:
    """Open sessions with workers of other processes."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_session(address: str) -> RouterHand:
            return await stack.enter_async_context(RouterHand(address))

        yield open_session


@pytest.fixture
def all_free() -> Callable[..., Awaitable[float]]:
    """Wait until workers hold nothing for anyone: every block free or merely cached, none swapped out.

    Returns the seconds that it took.
    """

    async def wait(*workers: WorkerProcess, timeout_s: float = 60.0) -> float:
        loop = asyncio.get_running_loop()
        began_s = loop.time()

        def is_free(worker: WorkerProcess) -> bool:
            load = worker.dispatcher.last_load
            if worker.dispatcher.num_owned or load is None or load.free_blocks < load.total_blocks:
                return False
            told = dict(load.counters)  # a load may be told while all are swapped out
            return not told.get("swap_blocks_in_use") and not told.get("draft_blocks_in_use")

        while not all(is_free(worker) for worker in workers):
            assert loop.time() - began_s < timeout_s, [
                (w.dispatcher.num_owned, w.dispatcher.last_load) for w in workers
            ]
            await asyncio.sleep(0.02)
        return loop.time() - began_s

    return wait


def prompt(num_tokens: int, salt: int = 0) -> list[int]:
    """Ids of an arbitrary prompt."""
    return [(i * 37 + salt * 101 + i * i % 11) % 250 for i in range(num_tokens)]


@pytest.fixture
def make_prompt() -> Callable[..., list[int]]:
    """`prompt`, for tests, which cannot import this file."""
    return prompt
