"""Tiny checkpoints written by transformers, and a hand that drives a decoder or runner without a scheduler."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")

from twostroke.checkpoint.adapters.adapter import read_adapter
from twostroke.checkpoint.config import KernelsChoice, ModelConfig
from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.spec import DType, ModelSpec
from twostroke.core.errors import ConfigError
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import SequenceStep, StateMove, StepPlan
from twostroke.kernels.cpu.build import built_library
from twostroke.kv.block import BlockId
from twostroke.kv.store.states import StateStore
from twostroke.kv.store.store import KvStore
from twostroke.model.adapters.loaded import LoadedAdapter, pack_adapter
from twostroke.model.batch import build_batch, read_whole, with_adapters
from twostroke.model.decoder.decoder import Decoder
from twostroke.model.loader import RunnerOptions, load_runner, make_ops, torch_dtype
from twostroke.model.ops.seam import Ops
from twostroke.model.resolved import ResolvedModel, resolve
from twostroke.model.runner import Runner
from twostroke.model.weights.tensors import open_source
from twostroke.model.weights.weights import Weights, load_weights

GREEDY = SamplingParams(max_tokens=64, temperature=0.0)


@dataclass(frozen=True)
class Tiny:
    """A random Llama small enough for a test."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 64
    layers: int = 2
    tied: bool = True
    rope: tuple[tuple[str, object], ...] = (("rope_type", "default"), ("rope_theta", 10000.0))
    shard_size: str = "1GB"


@pytest.fixture(scope="session")
def write_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, object]], Path]:
    """Save a random Llama of that shape (the same one for the same shape) with transformers."""
    made: dict[Tiny, Path] = {}

    def write(shape: dict[str, object]) -> Path:
        tiny = Tiny(**shape)  # type: ignore[arg-type]
        if tiny not in made:
            from transformers import LlamaConfig, LlamaForCausalLM

            torch.manual_seed(7)
            config = LlamaConfig(
                vocab_size=160,
                hidden_size=tiny.hidden,
                intermediate_size=96,
                num_hidden_layers=tiny.layers,
                num_attention_heads=tiny.heads,
                num_key_value_heads=tiny.kv_heads,
                head_dim=tiny.head_dim,
                max_position_embeddings=1024,
                tie_word_embeddings=tiny.tied,
                rope_parameters=dict(tiny.rope),
                initializer_range=0.2,
                eos_token_id=1,
                bos_token_id=0,
                dtype="float32",
            )
            directory = tmp_path_factory.mktemp("tiny")
            model = LlamaForCausalLM(config)
            for name, weight in model.named_parameters():
                if "norm" in name:
                    torch.nn.init.uniform_(weight, 0.5, 1.5)
            model.save_pretrained(directory, max_shard_size=tiny.shard_size)
            made[tiny] = directory
        return made[tiny]

    return write


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of a family, by its name in `tiny_families.py`; written once."""
    from support.checkpoints.tiny_families import FAMILIES, write_family

    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            write_family(next(family for family in FAMILIES if family.name == name), made[name])
        return made[name]

    return directory


@dataclass
class Hand:
    """A decoder with a poisoned store; gives blocks out in a scattered order and computes what it is told."""

    spec: ModelSpec
    decoder: Decoder
    store: KvStore
    tables: dict[str, list[BlockId]] = field(default_factory=dict)
    adapters: dict[str, LoadedAdapter] = field(default_factory=dict)  # by sequence
    states: dict[str, dict[int, int]] = field(default_factory=dict)  # of sequences: tokens to a state that covers them
    keep: tuple[int, ...] = ()  # positions at which further states are kept
    _blocks: itertools.count = field(default_factory=itertools.count)  # type: ignore[type-arg]
    _places: itertools.count = field(default_factory=lambda: itertools.count(1))  # type: ignore[type-arg]

    def table(self, name: str, tokens: int) -> tuple[BlockId, ...]:
        """Blocks of a sequence for that many tokens."""
        table = self.tables.setdefault(name, [])
        while len(table) * self.store.block_tokens < tokens:
            table.append(BlockId(next(self._blocks) * 7 % self.store.num_blocks))
        return tuple(table)

    def share(self, name: str, other: str, tokens: int) -> None:
        """Let a new sequence hold the leading whole blocks of another's."""
        self.tables[name] = self.tables[other][: tokens // self.store.block_tokens]
        if self.store.states is not None:
            self.states[name] = {tokens: self.states[other][tokens]}

    def moves(self, work: Sequence[tuple[str, int, Sequence[int]]]) -> tuple[StateMove, ...]:
        """States of the sequences of a step; none if the model has none."""
        return () if self.store.states is None else tuple(self._move(name, at, len(ids)) for name, at, ids in work)

    def _move(self, name: str, start: int, count: int) -> StateMove:
        states = self.states.setdefault(name, {0: 0})
        inner = [at for at in self.keep if start < at < start + count]
        states |= {at: next(self._places) for at in (*inner, start + count)}
        return StateMove(states[start], states[start + count], tuple((at - start, states[at]) for at in inner))

    def logits(
        self, work: Sequence[tuple[str, int, Sequence[int]]], read_rows: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """One step over (sequence, start, ids); logits [len(ids), vocab] of each, or of `read_rows` alone."""
        held = dict(enumerate(dict.fromkeys(self.adapters.values()), 1))  # one slot per adapter
        slots = {name: slot for name, mine in self.adapters.items() for slot, one in held.items() if one is mine}
        steps = [
            SequenceStep(
                SequenceKey(name, 0),
                start,
                tuple(ids),
                table := self.table(name, start + len(ids)),
                (1,) * len(table),
                True,
                GREEDY,
                0,
                adapter_slot=slots.get(name, 0),
            )
            for name, start, ids in work
        ]
        plan = StepPlan(0, tuple(steps), self.moves(work))
        with torch.inference_mode():
            batch = build_batch(plan, [s.token_ids for s in steps], self.store.block_tokens, self.decoder.ops)
            batch = read_whole(batch) if read_rows is None else replace(batch, read_rows=read_rows)
            batch = with_adapters(batch, plan, held, self.decoder.ops.device)
            logits = self.decoder.logits(self.decoder.hidden(batch, self.store).rows).rows
        return [logits[row : row + s.num_tokens] for row, s in zip(batch.first_rows, steps, strict=True)]


def loaded_adapter(base: Path, directory: Path, ops: Ops) -> LoadedAdapter:
    """An adapter of a checkpoint, read and packed."""
    spec = load_spec(base)
    return pack_adapter(read_adapter(directory, spec, open_source(base).shapes()), ops, spec)


def poison(store: KvStore) -> None:
    """Fill a store with bytes that are NaN in every codec, so that a read of what was never written shows."""
    for store_component in store.components:
        store_component.payload.fill_(0xFF)
        if store_component.scales is not None:
            store_component.scales.fill_(0xFF)
    if store.states is not None:
        for layer in range(store.states.spec.num_layers):
            for tensor in store.states.layer(layer):
                tensor[1:] = float("nan")


def resolved(directory: Path, kv_dtype: str = "auto", end_ids: Sequence[int] = (), **model: object) -> ResolvedModel:
    """The checkpoint as a worker on this machine's CPU resolves it. `model`: fields of `ModelConfig`."""
    found = resolve(directory, ModelConfig.model_validate(model), kv_dtype, "cpu", built_library)
    return found.ends_with(end_ids)


@pytest.fixture(scope="session")
def make_hand() -> Callable[..., Hand]:
    """A hand over a checkpoint, on as many threads as torch has now."""
    loaded: dict[tuple[Path, DType, KernelsChoice, int], tuple[ModelSpec, Weights, Ops]] = {}

    def make(
        directory: Path,
        dtype: DType = "float32",
        kv: str = "float32",
        block_tokens: int = 16,
        tokens: int = 4096,
        *,
        max_model_len: int | None = None,
        kernels: KernelsChoice = "torch",
    ) -> Hand:
        key = (directory, dtype, kernels, torch.get_num_threads())
        if key not in loaded:
            spec = load_spec(directory)
            try:
                ops = make_ops(torch_dtype(dtype), num_threads=torch.get_num_threads(), kernels=kernels)
            except ConfigError as error:
                pytest.skip(str(error))
            loaded[key] = (spec, load_weights(open_source(directory), spec, ops), ops)
        spec, weights, ops = loaded[key]
        ops.prepare()
        num_blocks = tokens // block_tokens | 1
        while num_blocks % 7 == 0:
            num_blocks += 2
        states = None if spec.state_spec is None else StateStore(spec.state_spec, 512)
        store = KvStore(spec.kv_spec(kv), num_blocks, block_tokens, digest_key=99, states=states)
        poison(store)
        return Hand(spec, Decoder(spec, weights, ops, max_model_len or spec.max_model_len), store)

    return make


@pytest.fixture
def make_runner() -> Callable[..., Runner]:
    """A warmed-up runner over a checkpoint with a poisoned store."""

    def make(directory: Path, **options: object) -> Runner:
        sizes = {name: options.pop(name) for name in tuple(options) if name in RunnerOptions.__slots__}
        chosen = replace(RunnerOptions(num_blocks=256, digest_key=99), **sizes)  # type: ignore[arg-type]
        runner = load_runner(resolved(directory, **options), chosen)  # type: ignore[arg-type]
        poison(runner.store)
        runner.warm_up()
        return runner

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread at the begin of each test, and afterwards as many as before: the number is the whole process's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
