"""A child's output in two files of bounded size, while the child goes on writing."""

import asyncio
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from twostroke.cluster.config import load_config
from twostroke.cluster.launch import process
from twostroke.cluster.launch import process as launch_process
from twostroke.cluster.launch.last_words import ProcessEnd, end_of_process
from twostroke.cluster.launch.launcher import Site
from twostroke.cluster.launch.member_log import MemberLog
from twostroke.cluster.launch.process import ProcessLauncher
from twostroke.cluster.placement import ProcessPlan


def test_a_full_log_begins_anew_under_its_writer_and_its_end_is_still_known(tmp_path: Path):
    log = MemberLog(tmp_path, "m", max_bytes=100_000)
    with log.open() as out, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) as child:
        assert child.stdin is not None
        for number in range(21):
            child.stdin.write(b"x" * 39_990 + b" %8d\n" % number)
            child.stdin.flush()
            while not log.tail().endswith(f"{number:8d}"):
                pass
            log.bound()
            sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
            assert set(sizes) <= {"m.log", "m.log.1"}
            assert all(size <= 140_000 for size in sizes.values())
        assert (tmp_path / "m.log").stat().st_size == 0
        assert log.tail().endswith("20")
        assert len(log.tail()) == 7999  # without the line end: all that is read of a log
    assert all(path.stat().st_mode & 0o77 == 0 for path in tmp_path.iterdir())


def test_a_writer_that_is_faster_than_the_copy_does_not_make_it_endless(tmp_path: Path, monkeypatch):
    log = MemberLog(tmp_path, "m", max_bytes=1_000)
    (tmp_path / "m.log").write_bytes(b"x" * 1_001)
    truncate = os.truncate

    def late(path, size):
        assert (tmp_path / "m.log.1").stat().st_size == 1_000
        truncate(path, size)

    monkeypatch.setattr(os, "truncate", late)
    with log.open() as out, subprocess.Popen(["yes"], stdout=out) as child:
        try:
            for _ in range(5):
                while (tmp_path / "m.log").stat().st_size <= 1_000:
                    pass
                log.bound()
        finally:
            child.kill()


def test_a_log_that_is_not_there_is_empty(tmp_path: Path):
    log = MemberLog(tmp_path / "gone", "m")
    log.bound()
    assert log.tail() == ""


CHILD = """
import os, sys
config = sys.stdin.read()
size = 0
while os.fstat(1).st_size >= size:  # until the file was cut
    size = os.fstat(1).st_size
    print("x" * 9_999, flush=True)
print("twostroke: the last word; configured with", len(config), file=sys.stderr)
sys.exit(2)
"""


async def test_a_chatty_members_log_is_cut_while_it_runs_and_its_last_words_are_told(monkeypatch):
    """It gets the configuration whole, also one that no pipe holds, and is told what ended it by its exit code."""
    monkeypatch.setattr(launch_process, "_LOG_CHECK_S", 0.01)
    monkeypatch.setattr(launch_process, "MemberLog", partial(MemberLog, max_bytes=100_000))
    keys = [f"key-{number:020d}" for number in range(20_000)]
    site, router = Site(load_config(flags={"router.api_keys": keys}), "", "", (0,)), ProcessPlan("router-0", "router")
    launcher = ProcessLauncher(site)
    monkeypatch.setattr(launcher, "_command", lambda _: [sys.executable, "-c", CHILD])
    ends = asyncio.Queue[ProcessEnd]()
    try:
        await launcher.start(router, lambda _, end: ends.put_nowait(end))
        end = await asyncio.wait_for(ends.get(), 60)
        size = len(process._config_text(site, router))
        assert end == ProcessEnd(f"the last word; configured with {size}", is_certain=True)
        assert size > 500_000
    finally:
        await launcher.close()


async def test_a_member_that_reads_nothing_ends_like_any_other(monkeypatch, caplog):
    launcher = ProcessLauncher(Site(load_config(flags={"router.api_keys": ["k" * 500_000]}), "", "", (0,)))
    monkeypatch.setattr(launcher, "_command", lambda _: ["false"])
    ends = asyncio.Queue[ProcessEnd]()
    try:
        await launcher.start(ProcessPlan("router-0", "router"), lambda _, end: ends.put_nowait(end))
        assert await asyncio.wait_for(ends.get(), 60) == ProcessEnd("exit code 1")
    finally:
        await launcher.close()
    assert caplog.text == ""


async def test_a_child_that_is_being_made_when_its_start_is_cancelled_is_ended_too(monkeypatch):
    launcher = ProcessLauncher(Site(load_config(), "", "", (0,)))
    monkeypatch.setattr(launcher, "_command", lambda _: ["sleep", "1000"])
    begun, made = asyncio.Event(), asyncio.Queue[asyncio.subprocess.Process]()
    create = asyncio.create_subprocess_exec

    async def slowly(*args, **keywords):
        begun.set()
        process = await create(*args, **keywords)
        await asyncio.sleep(0.05)
        made.put_nowait(process)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slowly)
    starting = asyncio.create_task(launcher.start(ProcessPlan("router-0", "router"), lambda *_: None))
    await begun.wait()
    starting.cancel()
    await asyncio.wait([starting])
    assert starting.cancelled()
    await launcher.abort()
    process = await asyncio.wait_for(made.get(), 60)
    assert await asyncio.wait_for(process.wait(), 60) == -9


def test_the_last_words_are_a_line_of_their_own_behind_a_copy_that_ends_within_one(tmp_path):
    log = MemberLog(tmp_path, "router-0", max_bytes=100)
    with log.open() as out:
        out.write(b"x" * 150)  # half of a line, when the file is cut
        out.flush()
        log.bound()
        out.write(b"twostroke: port 1 is in use\n")
        out.flush()
    assert log.tail().endswith("x\ntwostroke: port 1 is in use")
    assert end_of_process(2, log.tail()) == ProcessEnd("port 1 is in use", is_certain=True)
