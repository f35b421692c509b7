"""A command that is told to stop: work is given up, the exit status is the signal's, and no thread delays it."""

import asyncio
import signal
import subprocess
import sys
import textwrap

import pytest

from twostroke.core.foreground import Stop, Stopped, unless

BUSY_THREAD = textwrap.dedent("""
    import asyncio, sys, time
    from twostroke.core.foreground import run, unless
    async def main(stop):
        try:
            await unless(stop.asked, work())
        except BaseException:
            print("cleaned up", flush=True)
            raise
        return 0
    async def work():
        print("working", flush=True)
        await asyncio.to_thread(time.sleep, 100)
    sys.exit(run(main))
""")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_thread_that_cannot_be_stopped_does_not_delay_the_end(number: int, code: int):
    with subprocess.Popen([sys.executable, "-c", BUSY_THREAD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        assert process.wait(30) == code
        assert process.stdout.read() == "cleaned up\n"


async def test_work_that_is_done_first_gives_its_result_or_its_error():
    async def result() -> int:
        return 7

    async def error() -> int:
        raise ValueError("no")

    never = asyncio.Event()
    assert await unless(never, result()) == 7
    with pytest.raises(ValueError, match="no"):
        await unless(never, error())


async def test_work_that_comes_second_is_cancelled():
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.set()

    stop = Stop()
    asyncio.get_running_loop().call_soon(stop.hear, signal.SIGTERM)
    with pytest.raises(Stopped):
        await unless(stop.asked, work())
    assert ended.is_set()
    assert (stop.exit_code, stop.asked_again.is_set()) == (143, False)
    stop.hear(signal.SIGINT)
    assert (stop.exit_code, stop.asked_again.is_set()) == (143, True)
