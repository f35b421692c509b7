"""Steps through the whole runner: tokens, seals, hand-overs between stores, and numbers that are not numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import SampledPlace, SequenceStep, StepPlan, StepResult
from twostroke.kv.block import BlockId
from twostroke.kv.section import HeldTokens
from twostroke.model.runner import Runner

GREEDY = SamplingParams(max_tokens=64, temperature=0.0)
SEEDED = SamplingParams(max_tokens=64, temperature=1.2, top_p=0.95, top_k=50, seed=11)
MakeRunner = Callable[..., Runner]


@pytest.fixture(scope="module")
def tiny(write_tiny: Callable[[dict[str, object]], Path]) -> Path:
    return write_tiny({})


def ids_of(seed: int, length: int) -> list[int]:
    return torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Sequence:
    """A prompt and what follows it, with blocks of its own."""

    def __init__(self, name: str, ids: list[int], params: SamplingParams, first_block: int, block_tokens: int) -> None:
        self.key = SequenceKey(name, 0)
        self.ids = list(ids)
        self.num_prompt = len(ids)
        self.params = params
        self.computed = 0
        count = -(-(len(ids) + 64) // block_tokens)
        self.table = tuple(BlockId(first_block + count - 1 - i) for i in range(count))

    def step(self, limit: int = 10_000) -> SequenceStep:
        start, end = self.computed, min(len(self.ids), self.computed + limit)
        return SequenceStep(
            self.key,
            start,
            tuple(self.ids[start:end]),
            self.table,
            tuple(100 + b for b in self.table),
            samples=end == len(self.ids),
            params=self.params,
            num_generated=len(self.ids) - self.num_prompt,
            seals_tail=end == self.num_prompt,
        )

    def held(self, count: int, start: int = 0) -> HeldTokens:
        return HeldTokens(self.table, [100 + b for b in self.table], start, count)

    def take(self, step: SequenceStep, tokens: tuple[int, ...]) -> None:
        self.computed = step.end
        self.ids += tokens


def advance(runner: Runner, sequences: list[Sequence], limit: int = 10_000, number: int = 0) -> StepResult:
    steps = [sequence.step(limit) for sequence in sequences]
    result = runner.run(StepPlan(number, tuple(steps)))
    for sequence, step, tokens in zip(sequences, steps, result.tokens, strict=True):
        sequence.take(step, tokens)
    return result


def generate_alone(
    make_runner: MakeRunner, directory: Path, sequence: Sequence, count: int, **options: object
) -> list[int]:
    runner = make_runner(directory, **options)
    while len(sequence.ids) < sequence.num_prompt + count:
        advance(runner, [sequence])
    return sequence.ids[sequence.num_prompt :]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_do_not_depend_on_batch_or_chunks(
    make_runner: MakeRunner, tiny: Path, params: SamplingParams, dtype: str
) -> None:
    lengths = (5, 70, 300)
    alone = [
        generate_alone(make_runner, tiny, Sequence("s", ids_of(n, n), params, 0, 16), 12, dtype=dtype) for n in lengths
    ]
    runner = make_runner(tiny, dtype=dtype)
    together = [Sequence(f"s{n}", ids_of(n, n), params, 40 * i, 16) for i, n in enumerate(lengths)]
    while any(len(s.ids) < s.num_prompt + 12 for s in together):
        advance(runner, [s for s in together if len(s.ids) < s.num_prompt + 12], limit=33)
    assert [s.ids[s.num_prompt :] for s in together] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_only_sequences_that_sample_get_a_token_and_finished_hash_blocks_are_sealed(
    make_runner: MakeRunner, tiny: Path
) -> None:
    runner = make_runner(tiny)
    prompt = Sequence("p", ids_of(1, 40), GREEDY, 3, 16)
    assert advance(runner, [prompt], limit=24).tokens == ((),)
    assert runner.store.verify(prompt.held(16))
    assert not runner.store.verify(prompt.held(24))  # an unfinished hash block inside the prompt has no seal yet
    assert len(advance(runner, [prompt]).tokens[0]) == 1
    assert runner.store.verify(prompt.held(40))  # the prompt's tail is sealed with the prompt
    for _ in range(7):
        advance(runner, [prompt])
    assert not runner.store.verify(prompt.held(47))
    advance(runner, [prompt])
    assert runner.store.verify(prompt.held(48))


@pytest.mark.parametrize(
    ("model", "kv"), [("llama", "fp8"), ("llama", "bfloat16"), ("llama", "float32"), ("deepseek-v3", "fp8")]
)
@pytest.mark.parametrize(("prefill_block", "decode_block"), [(16, 64), (32, 16)])
def test_a_hand_over_between_stores_changes_no_token(
    make_runner: MakeRunner,
    tiny: Path,
    family_directory: Callable[[str], Path],
    *,
    model: str,
    kv: str,
    prefill_block: int,
    decode_block: int,
) -> None:
    directory = tiny if model == "llama" else family_directory(model)  # the latter caches a latent and a rotary key
    ids = ids_of(9, 75)
    expected = generate_alone(make_runner, directory, Sequence("s", ids, SEEDED, 0, 16), 10, kv_dtype=kv)
    prefill = make_runner(directory, kv_dtype=kv, block_tokens=prefill_block)
    decode = make_runner(directory, kv_dtype=kv, block_tokens=decode_block)
    here = Sequence("p", ids, SEEDED, 2, prefill_block)
    there = Sequence("d", ids, SEEDED, 5, decode_block)
    while len(here.ids) == len(ids):
        advance(prefill, [here], limit=20)
    for start, count in ((0, 32), (32, 32), (64, 11)):
        sections = prefill.store.read_tokens(here.held(count, start))
        decode.store.write_tokens(there.held(count, start), sections)
    assert decode.store.verify(there.held(75))
    there.ids.append(here.ids[-1])
    there.computed = 75
    while len(there.ids) < 85:
        advance(decode, [there])
    assert there.ids[75:] == expected


def test_a_plan_may_name_a_token_by_its_place_in_an_earlier_step(make_runner: MakeRunner, tiny: Path) -> None:
    expected = generate_alone(make_runner, tiny, Sequence("s", ids_of(2, 30), SEEDED, 0, 16), 3)
    runner = make_runner(tiny)
    other, sequence = Sequence("o", ids_of(3, 20), GREEDY, 50, 16), Sequence("s", ids_of(2, 30), SEEDED, 0, 16)
    first = advance(runner, [other, sequence], number=7)
    unknown = sequence.step()._replace(token_ids=(0,), from_place=SampledPlace(7, 1))
    second = runner.run(StepPlan(8, (unknown,)))
    assert [first.tokens[1][0], second.tokens[0][0]] == expected[:2]


def test_one_sequences_nan_fails_that_sequence_only(make_runner: MakeRunner, tiny: Path) -> None:
    runner = make_runner(tiny)
    clean = runner.run(StepPlan(0, (Sequence("clean", ids_of(4, 50), GREEDY, 0, 16).step(),)))
    head = runner.ops.pack(runner.weights.embedding.clone())
    object.__setattr__(runner.weights, "head", head)  # tied: else its logit would be NaN as well
    runner.weights.embedding[2] = torch.nan  # only prompts that hold token 2 meet it
    bad_ids = ids_of(5, 40)
    bad_ids[17] = 2
    good, bad = Sequence("good", ids_of(4, 50), GREEDY, 20, 16), Sequence("bad", bad_ids, GREEDY, 40, 16)
    result = advance(runner, [bad, good])
    assert result.non_finite == {bad.key}
    assert result.tokens == ((), clean.tokens[0])
    assert runner.store.verify(good.held(50))
    assert not runner.store.verify(bad.held(16))  # nothing of it may be cached or sent


def test_logits_that_are_no_numbers_fail_their_sequence_too(make_runner: MakeRunner, tiny: Path) -> None:
    runner = make_runner(tiny)
    runner.weights.norm.weight[0] = torch.inf
    sequence = Sequence("s", ids_of(6, 10), GREEDY, 0, 16)
    result = advance(runner, [sequence])
    assert result.non_finite == {sequence.key}
    assert result.tokens == ((),)


def test_an_empty_plan_is_an_empty_result(make_runner: MakeRunner, tiny: Path) -> None:
    assert make_runner(tiny).run(StepPlan(3, ())) == StepResult(3, ())
