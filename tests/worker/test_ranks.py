"""A worker of several rank processes: the tokens of one rank, one life and one end."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engines.worker_main import MAIN, settings_for

from twostroke.checkpoint.locate import BUNDLED, located
from twostroke.core.errors import CheckpointError, ConfigError, InternalError
from twostroke.core.request import Role
from twostroke.engine.config import StepConfig
from twostroke.kv.config import CacheConfig
from twostroke.worker.rank_order import RankOrder
from twostroke.worker.ranks import Ranks

LIMIT_S = 280.0
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def _linux() -> None:
    if sys.platform != "linux":
        pytest.skip("ranks share memory on Linux only")


def children(pid: int) -> list[int]:
    """Running processes whose parent is `pid`, without those that are dead and not collected yet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            facts = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(facts[1]) == pid and facts[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.02)


async def test_two_ranks_say_the_bundled_models_text(start_worker, router_of):
    directory = located(BUNDLED)
    model = {"dtype": "float32"}  # with fewer bits, two tokens that are nearly equal could change places
    texts = []
    for ranks in (1, 2):
        cache = CacheConfig(tokens=8192, dtype="float32")
        worker = await start_worker(
            Role.COMBINED, num_ranks=ranks, model_directory=str(directory), model=model, cache=cache
        )
        hand = await router_of(worker)
        prompts = ("def add(a, b):", "import os\n\nfor name in os.listdir(", "class Stack:")
        told = [
            await hand.submit(f"r{i}", worker.room.tokenizer.encode(prompt), sampling={"max_tokens": 60})
            for i, prompt in enumerate(prompts)
        ]
        texts.append([(await answer.ended(LIMIT_S)).text for answer in told])
    assert texts[0] == texts[1]
    assert all(texts[0])


@pytest.mark.parametrize(
    ("num_ranks", "kernels"),
    [(2, "native"), *(pytest.param(*more, marks=pytest.mark.campaign) for more in ((2, "torch"), (4, "native")))],
)
async def test_ranks_give_the_tokens_of_one(num_ranks, kernels, start_worker, router_of, make_prompt):
    prompts = [make_prompt(20), make_prompt(150, 1), make_prompt(70, 2)]
    answers, num_tokens = [], 40 if kernels == "native" else 8
    drawing = {"max_tokens": num_tokens, "ignore_eos": True}
    for ranks in (1, num_ranks):
        worker = await start_worker(Role.COMBINED, num_ranks=ranks, model={"kernels": kernels})
        hand = await router_of(worker)
        told = [
            await hand.submit(f"r{i}", ids, sampling=drawing | {"logprobs": 2 * (i == 1)})
            for i, ids in enumerate(prompts)
        ]
        drawn = await hand.submit("drawn", prompts[0], sampling={"max_tokens": 20, "temperature": 0.8, "seed": 5})
        scored = await hand.submit("scored", prompts[2], sampling={"max_tokens": 4, "prompt_logprobs": 1})
        answers.append([(await answer.ended(LIMIT_S)).token_ids for answer in (*told, drawn, scored)])
        assert f"TP {ranks}" in worker.info().model.numerics_description
        assert worker.info().model.kv_spec.groups[0].components[0].heads == 2
    assert answers[0] == answers[1]
    assert all(len(ids) == num_tokens for ids in answers[0][:3])


async def test_preempted_sequences_wait_in_the_host_memory_of_all_ranks(start_worker, router_of, make_prompt, all_free):
    answers = []
    for ranks, blocks in ((1, 512), (2, 14)):
        cache = CacheConfig(tokens=16 * blocks, frame_bytes=8192, swap_space=0.001)
        worker = await start_worker(Role.COMBINED, num_ranks=ranks, cache=cache, step=StepConfig(max_num_seqs=4))
        hand = await router_of(worker)
        told = [
            await hand.submit(f"r{i}", make_prompt(30, i), sampling={"max_tokens": 60, "ignore_eos": True})
            for i in range(4)
        ]
        answers.append([(await answer.ended(LIMIT_S)).token_ids for answer in told])
        counters = dict(worker.dispatcher.last_load.counters)
        await all_free(worker)
    assert answers[0] == answers[1]
    assert counters["swap_outs"] > 0 if "swap_outs" in counters else any("swap" in name for name in counters)


async def test_a_prompt_is_handed_over_between_workers_of_several_ranks(start_worker, router_of, make_prompt, all_free):
    answers = []
    for ranks in (1, 2):
        prefill = await start_worker(Role.PREFILL, num_ranks=ranks)
        decode = await start_worker(Role.DECODE, num_ranks=ranks)
        hand = await router_of(decode)
        told = [
            await hand.submit(f"r{i}", make_prompt(100 + i, i), [prefill], sampling={"max_tokens": 20})
            for i in range(2)
        ]
        answers.append([(await answer.ended(LIMIT_S)).token_ids for answer in told])
        assert [answer.end.handover.tokens_moved for answer in told] == [100, 101]
        await all_free(prefill, decode)
    assert answers[0] == answers[1]


async def serving(checkpoint: Path, *arguments: str) -> tuple[asyncio.subprocess.Process, str, list[int]]:
    """A worker with two more ranks in a process, its address, and the processes of its ranks."""
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-c",
            MAIN,
            settings_for(checkpoint, num_ranks=2, drain_timeout_s=LIMIT_S).model_dump_json(),
            *arguments,
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    async with asyncio.timeout(LIMIT_S):
        while b"serves at" not in (line := await process.stdout.readline()):
            assert line, "it died before it served"
    return process, line.split()[-1].decode(), children(process.pid)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.campaign), signal.SIGSTOP])
@pytest.mark.parametrize("is_busy", [True, pytest.param(False, marks=pytest.mark.campaign)])
async def test_a_dead_or_frozen_rank_ends_its_worker(number, is_busy, tiny_checkpoint, hand_to, make_prompt):
    process, address, pids = await serving(tiny_checkpoint)
    assert len(pids) == 1
    if is_busy:
        hand = await hand_to(address)
        answer = await hand.submit("r", make_prompt(20), sampling={"max_tokens": 1900, "ignore_eos": True})
        await answer.until(lambda a: len(a.token_ids) > 2, LIMIT_S)
    os.kill(pids[0], number)
    output, _ = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 1
    assert b"RankLost: rank 1" in output
    if number == signal.SIGKILL:
        assert b"this worker ends: rank 1 has ended: killed by SIGKILL" in output
    await until(lambda: all(map(is_gone, pids)))


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_ranks_end_with_their_worker(number, tiny_checkpoint):
    process, _, pids = await serving(tiny_checkpoint)
    regions = [
        os.readlink(link) for link in Path(f"/proc/{pids[0]}/map_files").glob("*") if "memfd" in os.readlink(link)
    ]
    assert any("twostroke-group" in region and "deleted" in region for region in regions)
    process.send_signal(number)
    await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    await until(lambda: all(map(is_gone, pids)))


@pytest.mark.campaign
async def test_a_signal_to_the_whole_group_lets_the_worker_drain(tiny_checkpoint, hand_to, make_prompt):
    process, address, pids = await serving(tiny_checkpoint)
    hand = await hand_to(address)
    answer = await hand.submit("r", make_prompt(20), sampling={"max_tokens": 200, "ignore_eos": True})
    await answer.until(lambda a: len(a.token_ids) > 2, LIMIT_S)
    os.kill(pids[0], signal.SIGTERM)
    process.terminate()
    await answer.ended(LIMIT_S)
    assert len(answer.token_ids) == 200
    await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0


def orders(checkpoint: Path, **changes: object) -> list[RankOrder]:
    settings = settings_for(checkpoint, num_ranks=2)
    whole = {"settings": settings, "size": 2, "num_blocks": 8, "num_swap_blocks": 0, "slot_bytes": 4096}
    return [RankOrder(rank=rank, **whole | changes) for rank in range(2)]


def test_a_rank_that_cannot_load_says_why(tiny_checkpoint, tmp_path):
    elsewhere = settings_for(tmp_path / "nowhere", num_ranks=2)
    ranks = Ranks.start(orders(tiny_checkpoint, settings=elsewhere), lambda _: None)
    with pytest.raises(CheckpointError, match=r"rank 1: .*nowhere"):
        ranks.wait_ready(LIMIT_S)
    pids = ranks.pids
    ranks.close()
    assert all(map(is_gone, pids))


def test_a_rank_that_dies_while_loading_is_told(tiny_checkpoint):
    lost: list[str] = []
    ranks = Ranks.start(orders(tiny_checkpoint), lost.append)
    os.kill(ranks.pids[0], signal.SIGKILL)
    with pytest.raises(InternalError, match="rank 1 ended while loading: killed by SIGKILL"):
        ranks.wait_ready(LIMIT_S)
    ranks.close()


def test_a_model_that_cannot_be_split_is_refused_before_it_is_loaded(tiny_checkpoint, start_worker):
    async def start() -> None:
        with pytest.raises(ConfigError, match=r"cannot be split over 3 .*sizes that work: 1, 2, 4"):
            await start_worker(Role.COMBINED, num_ranks=3)

    asyncio.run(start())
