"""Medusa heads through the real core and runners: plain decoding's tokens, and guesses of a plain computation."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints.heads import after, followed, write_circle, write_medusa
from support.engines.guessed import GREEDY, SAMPLED, SETTINGS, counted, told
from support.engines.sampling_room import Room, ids_of, submit

from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.link.messages import Bind, KvComplete, Source
from twostroke.engine.speculation.draft_model.plan import all_failed
from twostroke.engine.speculation.heads.planner import HeadsPlanner
from twostroke.engine.speculation.speculation import Speculation
from twostroke.model.heads.medusa import MedusaDrafter, load_medusa_weights
from twostroke.model.heads.resolved import load_medusa


@pytest.fixture
def runner(write_tiny, make_runner):
    return make_runner(write_tiny({}), dtype="float32", kv_dtype="float32")


@pytest.fixture
def circle(write_tiny, make_runner, tmp_path):
    """A model that counts, which heads can guess."""
    directory = tmp_path / "circle"
    directory.mkdir()
    return make_runner(write_circle(write_tiny({}), directory), dtype="float32", kv_dtype="float32")


def heads_of(runner, directory, num_heads=3):
    """A drafter of the heads in `directory` over `runner`, and the speculation that asks it."""
    weights = load_medusa_weights(load_medusa(directory), runner.ops, runner.spec.vocab_size)
    runner.ops.prepare()
    drafter = MedusaDrafter(runner, weights, runner.spec.eos_ids)
    drafter.warm_up()
    return drafter, lambda most=4: Speculation(HeadsPlanner(num_heads), most, "medusa")


def right_heads(runner, directory, num_heads=3):
    outputs = [after(runner.weights.embedding, 2 + head) for head in range(num_heads)]
    return heads_of(runner, write_medusa(directory, outputs=outputs, heads=num_heads), num_heads)


@pytest.mark.parametrize("name", SETTINGS)
def test_random_heads_change_no_token(runner, tmp_path, name):
    work = [submit(f"a{n}", ids_of(length, n), SETTINGS[name]) for n, length in enumerate((1, 16, 17, 40))]
    plain = Room(runner).run(*work)
    drafter, speculation = heads_of(runner, write_medusa(tmp_path))
    room = Room(runner, speculation=speculation(), drafter=drafter).run(*work)
    for command in work:
        assert told(room, command.key.request_id) == told(plain, command.key.request_id)
    assert counted(room, "draft_tokens") > 0
    assert room.pool.num_live == 0


@pytest.mark.parametrize("params", [GREEDY, replace(SAMPLED, temperature=0.4), replace(SAMPLED, top_k=5, min_p=0.1)])
def test_heads_that_know_the_model_are_always_right(circle, tmp_path, params):
    drafter, speculation = right_heads(circle, tmp_path)
    work = [submit(f"a{n}", ids_of(20, n), replace(params, max_tokens=24)) for n in range(2)]
    room = Room(circle, speculation=speculation(3), drafter=drafter)
    room.send(*work)
    num_steps = 0
    while room.step():
        num_steps += 1
    assert counted(room, "accepted_tokens") == counted(room, "draft_tokens") == 2 * 16
    # The prompts, then 1 + 1, 1 + 2 and 1 + 3 tokens, as the length of guesses grows; the last token is not guessed.
    assert num_steps == 8
    for command in work:
        last = command.prompt_ids[-1]
        assert room.tokens[command.key.request_id] == [followed(last, 1 + n) for n in range(24)]


def test_the_same_in_small_batches_beside_prompts_and_in_pools_that_are_too_small(runner, circle, tmp_path):
    for seed in range(3):
        draw = random.Random(seed)
        target = (runner, circle)[seed % 2]
        params = list(SETTINGS.values())
        work = [
            submit(f"x{n}", ids_of(draw.randint(1, 60), n), draw.choice(params), priority=draw.choice((0, 0, 1)))
            for n in range(6)
        ]
        plain = Room(target).run(*work)
        directory = tmp_path / str(seed)
        directory.mkdir()
        drafter, speculation = right_heads(target, directory)
        room = Room(
            target,
            draw.choice((combined_policy, decode_policy)),
            num_blocks=draw.choice((7, 9)),
            speculation=speculation(draw.choice((2, 9))),
            drafter=drafter,
            max_batch_tokens=draw.choice((16, 32, 64)),
            max_num_seqs=draw.choice((3, 8)),
        )
        room.send(*work[:3])
        for late in work[3:]:
            for _ in range(draw.randint(0, 9)):
                room.step()
            room.send(late)
        room.run()
        for command in work:
            assert told(room, command.key.request_id) == told(plain, command.key.request_id)
        assert counted(room, "draft_tokens") > 0
        assert sum(ended.preemptions for ended in room.ended.values()) > 0
        assert room.pool.num_live == 0
        target.features = None


def test_after_a_hand_over_guesses_begin_with_the_second_step(circle, tmp_path):
    prompt = ids_of(40)
    drafter, speculation = right_heads(circle, tmp_path)
    room = Room(circle, decode_policy, speculation=speculation(), drafter=drafter)
    room.run(submit("warm", (*prompt, 5), replace(GREEDY, max_tokens=1)))  # the prompt's KV is cached
    command = submit("p", prompt, GREEDY, Source.PEER)
    room.send(command)
    room.step()
    room.send(Bind(command.key), KvComplete(command.key, followed(prompt[-1], 1)))
    counts = [1]
    while room.step():
        counts.append(1 + len(room.tokens["p"]))
    assert counts[:4] == [1, 2, 4, 7]  # a token without a guess, then one with one guess, then with two
    assert room.tokens["p"] == [followed(prompt[-1], 2 + n) for n in range(29)]


@pytest.mark.parametrize("style", ["faster", "prefixed", "vllm"])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_guesses_are_those_of_a_plain_computation_of_the_files(write_tiny, make_runner, tmp_path, style, kernels):
    runner = make_runner(write_tiny({}), dtype="float32", kv_dtype="float32", kernels=kernels)
    token_map = list(range(159, 59, -1)) if style == "vllm" else None
    drafter, speculation = heads_of(runner, write_medusa(tmp_path, style, heads=2, token_map=token_map), 2)
    drawn = []
    original = drafter.guess

    def guess(plan):
        result = original(plan)
        drawn.extend(zip(plan.guesses.sequences, plan.lengths, result.guesses, strict=True))
        return result

    drafter.guess = guess
    commands = [submit(f"a{n}", ids_of(9 + n, n), GREEDY) for n in range(3)]
    room = Room(runner, speculation=speculation(2), drafter=drafter).run(*commands)
    tensors = load_file(tmp_path / ("model.safetensors" if style == "vllm" else "medusa_lm_head.safetensors"))
    tensors = {name.removeprefix("medusa_heads."): tensor for name, tensor in tensors.items()}
    texts = {c.key.request_id: [*c.prompt_ids, *room.tokens[c.key.request_id]] for c in commands}
    assert len(drawn) > 3
    for step, length, ids in drawn:
        hidden = last_hidden(write_tiny({}), texts[step.key.request_id][: step.end - 1])
        expected = []
        for head in range(length):
            z = hidden
            for block in range(2):
                name = f"blocks.{head}.layers.{block}" if style == "vllm" else f"{head}.{block}.linear"
                inner = tensors[f"{name}.weight"] @ z + tensors.get(f"{name}.bias", 0)
                z = z + torch.nn.functional.silu(inner)
            output = tensors[f"lm_heads.{head}.weight" if style == "vllm" else f"{head}.2.weight"]
            best = int((output @ z).argmax())
            expected.append(best if token_map is None else token_map[best])
        assert list(ids) == expected


_MODELS = {}


def last_hidden(directory, ids):
    """The last token's hidden state after the final norm, by transformers."""
    from transformers import LlamaModel

    if directory not in _MODELS:
        _MODELS[directory] = LlamaModel.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return _MODELS[directory](torch.tensor([ids])).last_hidden_state[0, -1]


def test_heads_that_fail_end_guessing_and_no_request(runner, tmp_path):
    work = [submit(f"x{n}", ids_of(20, n), GREEDY) for n in range(2)]
    plain = Room(runner).run(*work)
    drafter, speculation = heads_of(runner, write_medusa(tmp_path))
    calls = []
    original = drafter.guess

    def guess(plan):
        calls.append(plan)
        return all_failed(plan) if len(calls) == 1 else original(plan)

    drafter.guess = guess
    room = Room(runner, speculation=speculation(), drafter=drafter).run(*work)
    assert [told(room, name) for name in ("x0", "x1")] == [told(plain, name) for name in ("x0", "x1")]
    assert room.core.counters["draft_model_failures"] == 2
    assert len(calls) == 1
    assert not counted(room, "draft_tokens")
