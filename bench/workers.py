"""Real worker processes for measurements: a random checkpoint, `run_worker` in children, and a hand that orders."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostroke.checkpoint.locate import located
from twostroke.core.inside import InsideChannel
from twostroke.core.timeline import Timeline
from twostroke.kv.handover.transports.grpc import CHANNEL_OPTIONS
from twostroke.kv.keys import proof_key
from twostroke.kv.messages import adopt_instants
from twostroke.protos import common_pb2, worker_pb2, worker_pb2_grpc
from twostroke.worker.main import run_worker
from twostroke.worker.settings import WorkerSettings

START_S = 300.0
STOP_S = 15.0
HIDDEN = 64
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a token leaves in the cache; the rest of the checkpoint is as small as can be."""

    layers: int
    kv_heads: int
    head_dim: int


def write_checkpoint(directory: Path, shape: CacheShape, max_model_len: int) -> None:
    """A random Llama that computes little and caches much, with the bundled model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    bundled = located("bundled")
    for name in TOKENIZER_FILES:
        shutil.copy(bundled / name, directory / name)
    vocabulary = json.loads((bundled / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.kv_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(1)
    width = shape.kv_heads * shape.head_dim
    shapes = {"model.embed_tokens": (vocabulary, HIDDEN)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{part}_proj": (width, HIDDEN) for part in "qkv"}
        shapes |= {f"{prefix}.mlp.{part}_proj": (HIDDEN, HIDDEN) for part in ("gate", "up", "down")}
        shapes[f"{prefix}.self_attn.o_proj"] = (HIDDEN, width)
    weights = {f"{name}.weight": torch.randn(size, generator=random) * 0.1 for name, size in shapes.items()}
    norms = ["model.norm"] + [
        f"model.layers.{layer}.{norm}"
        for layer in range(shape.layers)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    weights |= {f"{name}.weight": torch.ones(HIDDEN) for name in norms}
    save_file(weights, directory / "model.safetensors")


class WorkerChild:
    """One worker in a child process, started as `twostroke worker` starts it."""

    def __init__(self, settings: WorkerSettings) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.settings = settings.model_copy(update={"port": port})
        self.address = f"127.0.0.1:{port}"
        self.info = common_pb2.WorkerInfo()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=run_worker, args=(self.settings, os.getpid()), daemon=True)
        self._process.start()

    async def serving(self) -> None:
        """Wait until it answers."""
        async with _channel(self) as channel:
            ask = asyncio.ensure_future(asyncio.wait_for(_described(channel), START_S))
            while not ask.done():
                await asyncio.wait([ask], timeout=0.5)
                if not self._process.is_alive():
                    raise SystemExit(f"{self.settings.worker_id} ended with code {self._process.exitcode}")
            self.info = ask.result()

    def stop(self) -> None:
        """SIGTERM, wait, SIGKILL."""
        self._process.terminate()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _channel(worker: WorkerChild) -> InsideChannel:
    return InsideChannel(worker.address, proof_key(worker.settings.cluster_key), CHANNEL_OPTIONS)


async def _described(channel: InsideChannel) -> common_pb2.WorkerInfo:
    await channel.channel_ready()  # a call that is older than its server is refused
    stub: Any = worker_pb2_grpc.WorkerStub(channel)
    info: common_pb2.WorkerInfo = await stub.Describe(worker_pb2.DescribeRequest())
    return info


class Hand:
    """One session with one decode worker, as a router holds it; one request at a time."""

    def __init__(self, worker: WorkerChild) -> None:
        self._channel = _channel(worker)
        self._count = 0

    async def __aenter__(self) -> Hand:
        stub: Any = worker_pb2_grpc.WorkerStub(self._channel)
        self._call = stub.Session()
        hello = worker_pb2.SessionHello(router_id="bench", router_incarnation=1)
        await self._call.write(worker_pb2.SessionUp(sequence=1, hello=hello))
        await self._call.read()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()
        await self._channel.close()

    async def generate(self, prompt: list[int], peer: WorkerChild | None, max_tokens: int) -> worker_pb2.RequestEnd:
        """Order one request with that prefill worker (None: with none), and wait for its end.

        Raises:
            RuntimeError: it ended with an error.
        """
        self._count += 1
        request_id = f"bench-{self._count}"
        order = worker_pb2.Submit(
            request_id=request_id,
            epoch=worker_pb2.Epoch(incarnation=1, counter=self._count),
            prompt_ids=prompt,
            sampling=common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=1, ignore_eos=True),
            isolation_domain="bench",
            prefill_peers=[
                worker_pb2.PrefillPeer(
                    worker_id=each.settings.worker_id, incarnation=each.info.incarnation, address=each.address
                )
                for each in ([] if peer is None else [peer])
            ],
            timeout_ms=300_000,
        )
        await self._call.write(worker_pb2.SessionUp(submit=order))
        while isinstance(message := await self._call.read(), worker_pb2.SessionDown):
            for end in message.step.ends:
                if end.request_id == request_id:
                    if end.HasField("error"):
                        raise RuntimeError(f"{end.error.code}: {end.error.message}")
                    return end
        raise RuntimeError("the session ended")


def timeline_of(end: worker_pb2.RequestEnd) -> Timeline:
    """The instants of a request, in seconds since the decode worker received it."""
    timeline = Timeline()
    adopt_instants(timeline, end.timeline, 0.0)
    return timeline
