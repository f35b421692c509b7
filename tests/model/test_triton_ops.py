"""The decoder over Triton kernels, in Triton's interpreter or on a GPU: torch's answers, and graphs of any size."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from support.checkpoints.adapters import save_adapter
from support.checkpoints.models import loaded_adapter

from twostroke.checkpoint.config_json import load_spec
from twostroke.core.errors import ConfigError
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import SequenceStep, StepPlan
from twostroke.kernels.gpu import launch
from twostroke.kv.block import BlockId
from twostroke.kv.section import HeldTokens
from twostroke.kv.store.store import KvStore
from twostroke.model.graphs import DecodeGraphs, can_capture, graph_sizes, padded_size
from twostroke.model.ops.device import refuse_unserved
from twostroke.model.ops.seam import Logits, Ops, Span
from twostroke.model.ops.torch_ops import TorchOps
from twostroke.model.ops.triton_ops import TritonOps
from twostroke.model.ops.upload import Arena, upload
from twostroke.model.runner import Runner
from twostroke.model.sampling.greedy import all_greedy, likeliest
from twostroke.model.sampling.sampler import Draw, Sampler
from twostroke.model.weights.tensors import open_source
from twostroke.model.weights.weights import load_weights

if launch.interpreted():
    from support.session.quick_interpreter import quicken

    quicken()

GREEDY = SamplingParams(max_tokens=64, temperature=0.0)
BLOCKS, DEVICE = 16, torch.device("cpu" if launch.interpreted() else "cuda")
PROMPTS = {
    "a": [5, 9, 33, 7, 2, 70, 71, 90, 10, 11, 3, 45, 66, 77, 88, 12, 13, 14, 15, 100],
    "b": [4, 8, 15],
    "c": [23],
}


def runner(directory: Path, ops: Ops, kv: str, *, by_kernels: bool, graph_seqs: int = 0) -> Runner:
    spec = load_spec(directory)
    weights = load_weights(open_source(directory), spec, ops)
    store = KvStore(spec.kv_spec(kv), BLOCKS, 16, ops.device, digest_key=5, by_kernels=by_kernels)
    for component in store.components:
        component.payload.fill_(0x7F)  # what nobody wrote must never come out
    made = Runner(spec, weights, ops, store, 64, graph_seqs=graph_seqs)
    made.warm_up()
    return made


class Talk:
    """Sequences that a runner prefills and decodes, mixed; remembers tokens and the logits they came from."""

    def __init__(
        self, under: Runner, monkeypatch: pytest.MonkeyPatch, slots: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self.slots = slots  # of adapters, by sequence
        self.runner, self.texts = under, {name: list(prompt) for name, prompt in PROMPTS.items()}
        self.done = dict.fromkeys(PROMPTS, 0)
        self.logits: list[torch.Tensor] = []
        decoder = under._decoder
        assert decoder is not None
        compute = decoder.logits

        def logits(rows: torch.Tensor) -> Logits:
            found = compute(rows)
            self.logits.append(found.rows)
            return found

        monkeypatch.setattr(decoder, "logits", logits)

    def table(self, name: str) -> tuple[BlockId, ...]:
        first = 5 * list(PROMPTS).index(name)
        return tuple(BlockId(first + i) for i in (2, 0, 1))

    def step(self, number: int, counts: dict[str, int]) -> None:
        steps = []
        for name, count in counts.items():
            start = self.done[name]
            ids = tuple(self.texts[name][start : start + count])
            self.done[name] += len(ids)
            last = self.done[name] == len(self.texts[name])
            steps.append(
                SequenceStep(
                    SequenceKey(name, 0), start, ids, self.table(name), (1, 2, 3), last, GREEDY,
                    len(self.texts[name]) - len(PROMPTS[name]), seals_tail=self.done[name] == len(PROMPTS[name]),
                    adapter_slot=self.slots.get(name, 0),
                )
            )  # fmt: skip
        result = self.runner.run(StepPlan(number, tuple(steps)))
        assert not result.non_finite
        for name, tokens in zip(counts, result.tokens, strict=True):
            self.texts[name] += tokens

    def run(self) -> None:
        self.step(0, {"c": 1, "a": 7})  # a decode-like row and a chunk
        self.step(1, {"c": 1, "a": 13, "b": 3})
        for number in range(2, 4):
            self.step(number, dict.fromkeys(PROMPTS, 1))  # a decode step, padded from 3 to 4
        self.step(4, {"b": 1})


def last_rows(talk: Talk) -> list[torch.Tensor]:
    """Logits of the sampled rows of each step, without padding."""
    return [logits[:n].cpu() for logits, n in zip(talk.logits, (1, 3, 3, 3, 1), strict=True)]


@pytest.mark.parametrize(
    ("family", "kv"),
    [
        ("llama-llama3", "fp8"),
        pytest.param("gemma2", "bfloat16", marks=pytest.mark.campaign),  # gpt-oss has windows, too
        pytest.param("qwen3-windows", "fp8", marks=pytest.mark.campaign),
        pytest.param("qwen2-moe", "bfloat16", marks=pytest.mark.campaign),  # and experts
        ("gpt-oss", "fp8"),
    ],
)
def test_families_answer_as_by_torch(
    family: str, kv: str, family_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    directory = family_directory(family)
    definition = Talk(runner(directory, TorchOps(torch.float32), kv, by_kernels=False), monkeypatch)
    graph_seqs = 0 if family == "qwen3-windows" and launch.interpreted() else 4  # captures take half of the time
    ops = TritonOps(torch.float32, DEVICE)
    ours = Talk(runner(directory, ops, kv, by_kernels=True, graph_seqs=graph_seqs), monkeypatch)
    definition.run()
    ours.run()
    assert (ours.runner._graphs is None) == (family in ("qwen2-moe", "gpt-oss") or not graph_seqs)
    assert ours.texts == definition.texts
    for mine, theirs in zip(last_rows(ours), last_rows(definition), strict=True):
        # A last bit of a value may turn a number of the cache into its neighbour, and that all that follows.
        assert (mine - theirs).abs().max() <= 5e-3 * theirs.abs().max()
        assert (mine - theirs).abs().median() <= 1e-3 * theirs.abs().max()
    for mine_of, theirs_of in zip(ours.runner.store.components, definition.runner.store.components, strict=True):
        assert (mine_of.payload[0].cpu() != theirs_of.payload[0]).float().mean() < 1e-4
    for name, prompt in PROMPTS.items():  # what the steps left as seals is what the bytes say
        whole = ours.done[name] - ours.done[name] % 16
        assert ours.runner.store.verify(HeldTokens(ours.table(name), (1, 2, 3), 0, whole or len(prompt)))


def test_rows_with_adapters_answer_as_by_torch(
    family_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Steps with adapters run without a graph; those of the other sequences are not touched by them."""
    directory = family_directory("llama-llama3")
    saved = [save_adapter(directory, tmp_path / str(r), seed=r, r=r) for r in (4, 16)]
    talks = []
    for ops in (TorchOps(torch.float32), TritonOps(torch.float32, DEVICE)):
        by_kernels = isinstance(ops, TritonOps)
        under = runner(directory, ops, "fp8", by_kernels=by_kernels, graph_seqs=4 if by_kernels else 0)
        for slot, adapter in enumerate(saved, 1):
            under.hold_adapter(slot, loaded_adapter(directory, adapter, ops))
        talks.append(Talk(under, monkeypatch, {"a": 2, "b": 1}))
        talks[-1].run()
    plain = Talk(runner(directory, TorchOps(torch.float32), "fp8", by_kernels=False), monkeypatch)
    plain.run()
    definition, ours = talks
    assert ours.texts == definition.texts
    assert ours.texts["c"] == plain.texts["c"]
    assert ours.texts["a"] != plain.texts["a"]
    for mine, theirs in zip(last_rows(ours), last_rows(definition), strict=True):
        assert (mine - theirs).abs().max() <= 5e-3 * theirs.abs().max()


def test_bf16_is_close_to_torch_in_bf16(family_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    directory = family_directory("llama-llama3")
    talks = [
        Talk(runner(directory, TorchOps(torch.bfloat16), "fp8", by_kernels=False), monkeypatch),
        Talk(runner(directory, TritonOps(torch.bfloat16, DEVICE), "fp8", by_kernels=True), monkeypatch),
    ]
    for talk in talks:
        talk.step(0, {"c": 1, "b": 3})
    theirs, mine = (talk.logits[0][:2].cpu() for talk in talks)
    assert (mine - theirs).abs().max() <= 0.05 * theirs.abs().max()


def test_single_rows_are_decoded_and_chunks_prefilled():
    spans = [Span(0, 40, 1, (BlockId(3), BlockId(1), BlockId(2))), Span(1, 0, 1, (BlockId(4),))]
    chunks = [Span(2, 10, 7, (BlockId(5), BlockId(6))), Span(9, 0, 1, (BlockId(7),))]
    layout = TritonOps(torch.float32, DEVICE).lay_out(spans + chunks, 16)
    assert layout.num_singles == 2
    assert layout.single_tables.tolist() == [[3, 1, 2], [4, 0, 0]]
    assert layout.single_contexts.tolist() == [41, 1]
    assert layout.chunk_tables.tolist() == [[5, 6], [7, 0]]
    assert layout.chunk_contexts.tolist() == [17, 1]
    assert layout.chunk_starts.tolist() == [0, 7, 8]


def test_int8_weights_are_those_of_the_definition():
    matrix, x = torch.randn(24, 32, generator=torch.Generator().manual_seed(3)), torch.randn(16, 32)
    ours, torchs = TritonOps(torch.float32, DEVICE, "int8"), TorchOps(torch.float32, 1, "int8")
    torch.testing.assert_close(
        ours.linear(x.to(DEVICE), ours.pack(matrix)).cpu(), torchs.linear(x, torchs.pack(matrix))
    )
    exact = ours.pack(matrix.bfloat16(), exact=True)
    assert exact.matrix.dtype == torch.float32
    assert torch.equal(exact.matrix.cpu(), matrix.bfloat16().float())


def test_what_the_kernels_do_not_cover_is_refused_by_name(family_directory: Callable[[str], Path]):
    with pytest.raises(ConfigError, match="DeepseekV2ForCausalLM attends to a latent cache"):
        refuse_unserved(load_spec(family_directory("deepseek-v2")), "fp8")
    llama = load_spec(family_directory("llama-llama3"))
    with pytest.raises(ConfigError, match=r"cache.dtype is 'float32'"):
        refuse_unserved(llama, "float32")
    refuse_unserved(llama, "fp8")
    with pytest.raises(ConfigError, match="outside plain attention"):
        TritonOps(torch.float32, DEVICE).rotary(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert can_capture(llama)
    assert not can_capture(load_spec(family_directory("qwen2-moe")))


def test_sizes_hold_every_batch_and_waste_less_than_half():
    assert graph_sizes(1) == (1,)
    assert graph_sizes(8) == (1, 2, 4, 8)
    assert graph_sizes(100) == (1, 2, 4, 8, 16, 32, 64, 100)
    sizes = graph_sizes(100)
    for num_seqs in range(1, 101):
        size = padded_size(sizes, num_seqs)
        assert size is not None
        assert num_seqs <= size < 2 * num_seqs
    assert padded_size(sizes, 101) is None


def test_graphs_serve_decode_steps_that_fit_and_nothing_else(family_directory: Callable[[str], Path]):
    made = runner(family_directory("llama-llama3"), TritonOps(torch.float32, DEVICE), "fp8", by_kernels=True)
    assert made._decoder is not None
    graphs = DecodeGraphs(made._decoder, made.store, 2)

    def plan(*spans: tuple[int, int]) -> StepPlan:
        steps = [
            SequenceStep(SequenceKey(str(i), 0), start, (1,) * count, (BlockId(0),) * 8, (1,) * 8, True, GREEDY, 0)
            for i, (start, count) in enumerate(spans)
        ]
        return StepPlan(0, tuple(steps))

    assert graphs.serves(plan((3, 1), (63, 1)))
    assert not graphs.serves(plan((3, 1), (3, 2)))
    assert not graphs.serves(plan((64, 1)))  # beyond the context that it was made for
    assert not graphs.serves(plan((1, 1), (1, 1), (1, 1)))


def test_the_likeliest_token_is_the_samplers():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    logits[1, [7, 30, 299]] = logits[1].max() + 1  # equals: the lowest id
    logits[2, 5], logits[3, 5], logits[4, 5] = float("nan"), float("inf"), float("-inf")
    wanted = Sampler(()).sample(logits.numpy(), [Draw(GREEDY, 0, 0)] * 7)
    assert likeliest(logits.to(DEVICE)).tolist() == [-1 if s is None else s.token_id for s in wanted]


@pytest.mark.parametrize(
    ("params", "is_greedy"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.7}, False),
        ({"temperature": 0.0, "logprobs": 0}, False),
        ({"temperature": 0.0, "min_tokens": 3}, False),
        ({"temperature": 0.0, "frequency_penalty": 0.5}, False),
    ],
)
def test_only_plain_greedy_steps_stay_on_the_device(params: dict[str, float], is_greedy: bool):
    wanted = SamplingParams(max_tokens=8, **params)  # type: ignore[arg-type]
    step = SequenceStep(SequenceKey("a", 0), 0, (1,), (BlockId(0),), (1,), True, wanted, 0)
    assert all_greedy(StepPlan(0, (step,))) is is_greedy


def test_an_arena_keeps_its_tensors_apart():
    parts = [torch.arange(5), torch.arange(3, dtype=torch.int32).reshape(3, 1), torch.zeros((0, 4), dtype=torch.int32)]
    for mine, theirs in zip(upload(parts, DEVICE), parts, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.cpu(), theirs)
        assert mine.numel() == 0 or mine.data_ptr() % 16 == 0
    arena = Arena([((2,), torch.int64), ((1,), torch.int32)], DEVICE)
    arena.host[0].fill_(7)
    assert arena.device[0].tolist() == [0, 0]
    arena.send()
    assert arena.device[0].tolist() == [7, 7]
    assert arena.device[1].tolist() == [0]
