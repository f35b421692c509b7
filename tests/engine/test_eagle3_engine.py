"""An EAGLE-3 head through the real core and runners: plain decoding's tokens, and guesses of a plain computation."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints.heads import VOCAB, after, followed, write_circle, write_eagle3
from support.engines.guessed import GREEDY, SAMPLED, SETTINGS, counted, told
from support.engines.sampling_room import Room, ids_of, submit

from twostroke.core.request import SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.link.messages import Bind, CancelSequence, KvComplete, Source
from twostroke.engine.speculation.draft_model.holdings import DraftHoldings
from twostroke.engine.speculation.draft_model.plan import all_failed
from twostroke.engine.speculation.heads.layer_planner import LayerPlanner, proposer_of
from twostroke.engine.speculation.speculation import Speculation
from twostroke.kv.store.store import KvStore
from twostroke.model.heads.eagle3 import load_eagle3_head
from twostroke.model.heads.layered import LayerDrafter
from twostroke.model.heads.resolved import load_eagle3

FOUR = {"layers": 4}


@pytest.fixture
def runner(write_tiny, make_runner):
    return make_runner(write_tiny(FOUR), dtype="float32", kv_dtype="float32")


@pytest.fixture
def circle(write_tiny, make_runner, tmp_path):
    """A model that counts, which a head can guess."""
    directory = tmp_path / "circle"
    directory.mkdir()
    return make_runner(write_circle(write_tiny(FOUR), directory), dtype="float32", kv_dtype="float32")


def head_of(runner, directory, *, context=1024):
    """A drafter of the head in `directory` over `runner`, and the speculation that asks it."""
    spec = load_eagle3(directory, runner.spec.num_layers)
    head = load_eagle3_head(spec, runner)
    runner.ops.prepare()
    store = KvStore(spec.layer.kv_spec("float32"), 64, 16)
    for component in store.components:
        component.payload.fill_(0xFF)  # not numbers, so that a read of what was never written shows
    drafter = LayerDrafter(runner, head, store, spec.layers_tapped)
    drafter.warm_up()

    def speculation(most=4, num_blocks=64):
        holdings = DraftHoldings(num_blocks, 16, finds_prefixes=False)
        return Speculation(LayerPlanner(context, holdings), most, "eagle3")

    return drafter, speculation


def right_head(runner, directory, **more):
    return head_of(runner, write_eagle3(directory, knows=True, outputs=after(runner.weights.embedding, 1)), **more)


def is_all_free(room):
    return room.pool.num_live == 0 and room.core._scheduler.guess_planner.holdings.pool.num_live == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_a_random_head_changes_no_token(runner, tmp_path, name):
    work = [submit(f"a{n}", ids_of(length, n), SETTINGS[name]) for n, length in enumerate((1, 16, 40))]
    plain = Room(runner).run(*work)
    drafter, speculation = head_of(runner, write_eagle3(tmp_path))
    room = Room(runner, speculation=speculation(), drafter=drafter).run(*work)
    for command in work:
        assert told(room, command.key.request_id) == told(plain, command.key.request_id)
    assert counted(room, "draft_tokens") > 0
    assert room.core.counters["draft_model_failures"] == 0
    assert is_all_free(room)


@pytest.mark.parametrize("params", [GREEDY, replace(SAMPLED, temperature=0.4, top_k=5)])
def test_a_head_that_knows_the_model_is_always_right(circle, tmp_path, params):
    drafter, speculation = right_head(circle, tmp_path)
    work = [submit(f"a{n}", ids_of(40, n), replace(params, max_tokens=24)) for n in range(2)]
    room = Room(circle, speculation=speculation(3), drafter=drafter, max_batch_tokens=32)
    room.run(*work)
    assert counted(room, "accepted_tokens") == counted(room, "draft_tokens") >= 30
    for command in work:
        last = command.prompt_ids[-1]
        assert room.tokens[command.key.request_id] == [followed(last, 1 + n) for n in range(24)]
    assert is_all_free(room)


def test_the_same_in_small_batches_beside_prompts_and_in_pools_that_are_too_small(runner, tmp_path):
    num_preemptions = 0
    for seed in range(3):
        draw = random.Random(seed)
        work = [
            submit(f"x{n}", ids_of(draw.randint(1, 60), n), draw.choice(list(SETTINGS.values())), priority=n % 2)
            for n in range(6)
        ]
        runner.features = None
        plain = Room(runner).run(*work)
        drafter, speculation = head_of(runner, write_eagle3(tmp_path, seed=seed), context=draw.choice((40, 1024)))
        room = Room(
            runner,
            draw.choice((combined_policy, decode_policy)),
            num_blocks=7,
            speculation=speculation(draw.choice((2, 9)), draw.choice((3, 6, 12))),
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
        num_preemptions += sum(ended.preemptions for ended in room.ended.values())
        assert room.core.counters["draft_model_failures"] == 0
        assert is_all_free(room)
    assert num_preemptions > 0


def test_after_a_hand_over_and_behind_a_cached_prefix_the_head_begins_with_the_first_row_here(circle, tmp_path):
    prompt = ids_of(40)
    drafter, speculation = right_head(circle, tmp_path)
    room = Room(circle, decode_policy, speculation=speculation(), drafter=drafter)
    room.run(submit("warm", (*prompt, 5), replace(GREEDY, max_tokens=1)))  # the prompt's KV is cached
    command = submit("p", prompt, GREEDY, Source.PEER)
    room.send(command)
    room.step()
    room.send(Bind(command.key), KvComplete(command.key, followed(prompt[-1], 1)))
    counts = [1]
    while room.step():
        counts.append(1 + len(room.tokens["p"]))
        sequence = room.core._scheduler.by_key.get(command.key)
        if sequence is not None and len(counts) > 2:
            assert proposer_of(sequence).first == 32  # the cached blocks
    assert counts[:4] == [1, 2, 4, 7]  # a token without a guess, then one with one guess, then with two
    assert room.tokens["p"] == [followed(prompt[-1], 2 + n) for n in range(29)]
    assert counted(room, "accepted_tokens") == counted(room, "draft_tokens")
    assert is_all_free(room)


@pytest.mark.parametrize(("style", "kernels"), [("authors", "torch"), ("authors", "auto"), ("speculators", "auto")])
def test_guesses_are_those_of_a_plain_computation_of_the_files(write_tiny, make_runner, tmp_path, style, kernels):
    runner = make_runner(write_tiny(FOUR), dtype="float32", kv_dtype="float32", kernels=kernels)
    more = {"norm_before_residual": True, "embedding": torch.randn(VOCAB, 64)} if style == "speculators" else {}
    token_map = list(range(3, VOCAB, 2)) if style == "authors" else None
    drafter, speculation = head_of(runner, write_eagle3(tmp_path, style, token_map=token_map, **more))
    drawn = []
    original = drafter.guess

    def guess(plan):
        result = original(plan)
        drawn.extend(zip(plan.guesses.sequences, plan.lengths, result.guesses, strict=True))
        return result

    drafter.guess = guess
    commands = [submit(f"a{n}", ids_of(9 + 30 * n, n), GREEDY) for n in range(2)]
    room = Room(runner, speculation=speculation(2), drafter=drafter, max_batch_tokens=32)
    room.send(*commands)
    while room.step():
        for sequence in room.core._scheduler.by_key.values():
            if sequence.drafting is not None:
                sequence.drafting.length.length = 2  # guess two after each step, right or not
    plain = Plain(write_tiny(FOUR), tmp_path, norm_first=bool(more))
    texts = {c.key.request_id: [*c.prompt_ids, *room.tokens[c.key.request_id]] for c in commands}
    assert len(drawn) > 20
    for step, length, ids in drawn:
        assert list(ids) == plain.guesses(texts[step.key.request_id][: step.end + 1], length)


class Plain:
    """Guesses of an EAGLE-3 head computed from its files at once, with the model's hidden states by transformers."""

    def __init__(self, model, directory, *, norm_first):
        from transformers import LlamaModel

        self.model = LlamaModel.from_pretrained(model, dtype=torch.float32)
        tensors = load_file(directory / "model.safetensors")
        self.w = {
            n.removeprefix("midlayer.").removeprefix("layers.0.").removesuffix(".weight"): t for n, t in tensors.items()
        }
        self.embedding = self.w.get("embed_tokens", self.model.embed_tokens.weight.detach())
        self.norm_first = norm_first

    @torch.no_grad()
    def guesses(self, ids, count):
        states = self.model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        features = torch.cat([states[i][0] for i in (1, 2, 3)], dim=1) @ self.w["fc"].T
        behind, found = list(ids[1:]), []
        for _ in range(count):
            y = self.layer(self.embedding[behind], features)
            best = int((self.w["lm_head"] @ self.norm(y[-1:], "norm")[0]).argmax())
            found.append(best + int(self.w["d2t"][best]))
            features, behind = torch.cat((features, y[-1:])), [*behind, found[-1]]
        return found

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.w[name]

    def layer(self, embedded, features):
        w, n = self.w, len(features)
        normed = self.norm(features, "hidden_norm")
        h = torch.cat((self.norm(embedded, "input_layernorm"), normed), dim=1)
        q, k, v = ((h @ w[f"self_attn.{x}_proj"].T).view(n, -1, 32).transpose(0, 1) for x in "qkv")
        q, k = turned(q), turned(k)
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(n, -1)
        x = (normed if self.norm_first else features) + mixed @ w["self_attn.o_proj"].T
        h = self.norm(x, "post_attention_layernorm")
        gated = torch.nn.functional.silu(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)
        return x + gated @ w["mlp.down_proj"].T


def turned(x):
    """Rotary positions of x [heads, n, 32]."""
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(16) / 16)
    cos, sin, (low, high) = angles.cos(), angles.sin(), x.chunk(2, dim=2)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=2)


def test_a_cancel_between_steps_frees_the_heads_blocks(circle, tmp_path):
    drafter, speculation = right_head(circle, tmp_path)
    room = Room(circle, speculation=speculation(8), drafter=drafter)
    room.send(submit("a", ids_of(30), GREEDY), submit("c", ids_of(30, 2), SAMPLED))
    for _ in range(4):
        room.step()
    key = SequenceKey("c", 0)
    assert proposer_of(room.core._scheduler.by_key[key]).blocks
    room.send(CancelSequence(key))
    room.core.check_integrity()
    room.run()
    assert room.tokens["a"] == [followed(ids_of(30)[-1], 1 + n) for n in range(30)]
    assert is_all_free(room)


def test_a_head_that_fails_ends_guessing_and_no_request(circle, tmp_path):
    work = [submit(f"x{n}", ids_of(20, n), GREEDY) for n in range(2)]
    plain = Room(circle).run(*work)
    drafter, speculation = right_head(circle, tmp_path)
    calls = []
    original = drafter.guess

    def guess(plan):
        calls.append(plan)
        return all_failed(plan) if len(calls) == 3 else original(plan)

    drafter.guess = guess
    room = Room(circle, speculation=speculation(), drafter=drafter).run(*work)
    assert [told(room, name) for name in ("x0", "x1")] == [told(plain, name) for name in ("x0", "x1")]
    assert room.core.counters["draft_model_failures"] == 2
    assert len(calls) == 3
    assert is_all_free(room)
