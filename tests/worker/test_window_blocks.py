"""Real workers of a model with a window in every other layer: what travels, what is found later, the same tokens."""

import asyncio
import json
import shutil

import pytest
from support.engines.workers import Answer
from support.fakes.list_router import Router

from twostroke.core.request import CacheScope, Role
from twostroke.engine.config import StepConfig
from twostroke.kv.config import CacheConfig
from twostroke.protos import worker_pb2

LONG, WINDOW = 500, 40
FIRST = 384  # from here on windowed layers travel: 448 - 40 + 1, rounded down
SHARE = 1 - FIRST / LONG / 2  # of the bytes: one of the two layers has a window
WAIT_S = 120.0


@pytest.fixture(scope="session")
def windowed_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny Llama with a window in its first layer."""
    directory = tmp_path_factory.mktemp("tiny-windows")
    shutil.copytree(tiny_checkpoint, directory, dirs_exist_ok=True)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config |= {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "sliding_window": WINDOW}
    config |= {"layer_types": ["sliding_attention", "full_attention"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def start(start_worker, windowed_checkpoint):
    def begin(role: Role, block_size: int = 16, **cache):
        sizes = CacheConfig(tokens=8192, frame_bytes=8192, block_size=block_size, **cache)
        step = StepConfig(max_num_batched_tokens=256)
        return start_worker(role, model_directory=str(windowed_checkpoint), cache=sizes, step=step)

    return begin


async def asked(hand, request_id, prompt, peers=(), **options):
    return await (await hand.submit(request_id, prompt, peers, **options)).ended(WAIT_S)


@pytest.mark.parametrize("transport", ["grpc", "auto"])
async def test_two_workers_say_what_one_says_and_send_only_the_window(
    start, router_of, make_prompt, all_free, transport
):
    alone, prefill = await start(Role.COMBINED), await start(Role.PREFILL, transport=transport)
    decode = await start(Role.DECODE, 64, transport=transport)
    one, two = await router_of(alone), await router_of(decode)
    prompt = make_prompt(LONG, 1)
    truth, answer = await asked(one, "r", prompt), await asked(two, "r", prompt, [prefill])
    assert answer.token_ids == truth.token_ids
    moved = answer.end.handover
    assert (moved.tokens_moved, moved.tokens_held, moved.recomputed_tokens) == (LONG, 0, 0)
    rows = decode.room.facts.model.kv_spec.bytes_per_token * LONG
    assert SHARE * rows < moved.bytes_moved < 1.15 * SHARE * rows, f"{moved.bytes_moved} of {rows} bytes"

    # The same prompt again, and the next turn: found here, with their windows.
    again = await asked(two, "again", prompt, [prefill])
    assert again.token_ids == truth.token_ids
    assert again.end.handover.tokens_held == 448
    turn = [*prompt, *truth.token_ids, *make_prompt(100, 2)]
    truth, answer = await asked(one, "turn", turn), await asked(two, "turn", turn, [prefill])
    assert answer.token_ids == truth.token_ids
    assert answer.end.handover.tokens_held >= 448

    # Another prompt with the same beginning: its windows are not here, so all of it is sent.
    other = [*prompt[:300], *make_prompt(200, 3)]
    truth, answer = await asked(one, "other", other), await asked(two, "other", other, [prefill])
    assert answer.token_ids == truth.token_ids
    assert answer.end.handover.tokens_held == 0
    assert answer.end.handover.prefill_cached_tokens == 288, "the prefill worker has computed it, and has it all"
    await all_free(alone, prefill, decode)


async def test_a_stream_that_goes_on_elsewhere_fetches_only_the_window(start, router_of, make_prompt, all_free):
    """What came to the first decode worker without its windows leaves it the same way, and goes on from there."""
    prefill = await start(Role.PREFILL, transport="grpc")
    first, second = await start(Role.DECODE, transport="grpc"), await start(Role.DECODE, 64, transport="grpc")
    hand, other = await router_of(first), await router_of(second)
    prompt = make_prompt(LONG, 4)
    sampling = {"max_tokens": 40, "ignore_eos": True}
    truth = (await asked(hand, "r", prompt, [prefill], sampling=sampling)).token_ids
    whole = [*prompt, *truth[:30]]  # the client has so many: the rest is generated again
    names = first.room.facts.namer.name(whole, CacheScope("tests", b"")).identities
    source = worker_pb2.BlockSource(
        worker_id=first.settings.worker_id,
        incarnation=first.incarnation,
        address=first.address,
        num_blocks=len(names),
    )
    other.answers["r", 0] = Answer(list(truth[:30]))
    answer = await asked(
        other, "r", whole, [prefill], emitted_tokens=30, block_sources=[source], sampling=sampling, counter=2
    )
    assert answer.token_ids == truth
    told = answer.end.handover
    assert (told.fetch_end, told.tokens_fetched) == ("complete", (len(whole) - 1) // 16 * 16)
    rows = second.room.facts.model.kv_spec.bytes_per_token * told.tokens_fetched
    assert told.bytes_fetched < 1.15 * (1 - 448 / 528 / 2) * rows
    await all_free(prefill, first, second)


async def test_a_fetch_of_a_beginning_whose_windows_are_gone_gives_nothing(start, router_of, make_prompt, all_free):
    prefill = await start(Role.PREFILL, transport="grpc")
    first, second = await start(Role.DECODE, transport="grpc"), await start(Role.DECODE, transport="grpc")
    hand, other = await router_of(first), await router_of(second)
    prompt = make_prompt(LONG, 5)
    await asked(hand, "r", prompt, [prefill])
    shared = [*prompt[:300], *make_prompt(100, 6)]
    source = worker_pb2.BlockSource(
        worker_id=first.settings.worker_id, incarnation=first.incarnation, address=first.address, num_blocks=18
    )
    answer = await asked(other, "s", shared, [prefill], block_sources=[source])
    truth = await asked(hand, "s", shared, [])
    assert answer.token_ids == truth.token_ids
    assert (answer.end.handover.fetch_end, answer.end.handover.tokens_fetched) == ("empty", 0)
    assert answer.end.handover.tokens_moved == 400
    await all_free(prefill, first, second)


class Expecting:
    """A router's map of one worker, fed by the worker's own events."""

    def __init__(self, worker, hand):
        self.worker, self.router = worker, Router()
        self.key = self.router.join(worker.settings.worker_id, worker.incarnation)
        self.router.roster.watching(self.key)
        self._stream = hand.stub.Watch(worker_pb2.WatchRequest(router_id="expecting"))
        self._heard = 0

    @property
    def _has_heard_all(self):
        (watcher,) = self.worker.faces.watchers._open or (None,)
        return self._heard > 0 and self._heard == watcher.sequence and not watcher._deltas

    async def expected(self, prompt):
        """Tokens of a prompt that a router believes to be cached there, when it has heard of all that is."""
        prefixes = self.router.roster.prefixes
        async with asyncio.timeout(WAIT_S):
            while not self._has_heard_all:
                event = await self._stream.read()
                assert self.router.roster.take_event(self.key, event, 0.0)
                self._heard = event.sequence
        names = self.worker.room.facts.namer.name(prompt, CacheScope("tests", b"")).identities
        return prefixes.held(names[: (len(prompt) - 1) // 16]).get(self.key.worker_id, 0) * 16


@pytest.mark.parametrize("block_size", [16, 64])
async def test_a_router_expects_what_the_worker_finds(start, router_of, make_prompt, all_free, block_size):
    prefill, decode = await start(Role.PREFILL, transport="grpc"), await start(Role.DECODE, block_size)
    hand = await router_of(decode)
    map_ = Expecting(decode, hand)
    assert await map_.expected(make_prompt(LONG, 8)) == 0
    prompt = make_prompt(LONG, 8)
    first = await asked(hand, "first", prompt, [prefill])
    await all_free(prefill, decode)
    found = []
    asked_for = {
        "again": prompt,
        "turn": [*prompt, *first.token_ids, *make_prompt(100, 9)],
        "other": [*prompt[:300], *make_prompt(200, 10)],  # its beginning is here, but not what its window needs
        "shorter": prompt[:250],
        "by itself": [*prompt[:340], *make_prompt(60, 11)],
        "other again": [*prompt[:300], *make_prompt(200, 10)],
    }
    for name, wanted in asked_for.items():
        expected = await map_.expected(wanted)
        answer = await asked(hand, name, wanted, [] if name == "by itself" else [prefill])
        assert answer.end.handover.tokens_held == expected, name
        found.append(expected)
        await all_free(prefill, decode)
    assert found[0] >= 448, "the same prompt again"
    assert found[2] == 0, "blocks alone would have promised 288"
    map_.router.roster.prefixes.check_integrity()


async def test_a_hand_over_that_is_lost_midway_is_computed_from_where_all_layers_are(
    start, router_of, make_prompt, all_free
):
    prefill, decode = await start(Role.PREFILL, transport="grpc"), await start(Role.DECODE, transport="grpc")
    alone = await start(Role.COMBINED)
    hand, one = await router_of(decode), await router_of(alone)
    prompt = make_prompt(LONG, 7)
    truth = await asked(one, "r", prompt)
    answer = await hand.submit("r", prompt, [prefill])
    async with asyncio.timeout(WAIT_S):
        while not decode.counters["handover_decode_frames"]:
            await asyncio.sleep(0.001)
    await prefill.stop(0.0)
    await answer.ended(WAIT_S)
    assert answer.token_ids == truth.token_ids
    told = answer.end.handover
    # Nothing was lost if all had arrived; else nothing is kept, because the windows of no token in between are here.
    assert told.recomputed_tokens in (0, *range(LONG - 448 + 1), LONG)
    await all_free(decode, alone)
