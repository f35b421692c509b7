"""Does work in one thread leave the others their turn? One thread ticks while the work runs in another."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

TICK_S = 0.001


class Ticked(NamedTuple):
    """Both in seconds. A gap near the work's own duration means that the work held the GIL."""

    longest_gap_s: float
    work_s: float

    @property
    def share(self) -> float:
        """The gap as a part of the work: the same on slow machines and quick ones."""
        return self.longest_gap_s / self.work_s


def ticked_while(work: Callable[[], object]) -> Ticked:
    """The longest gap between two ticks while `work` runs in another thread; raises what it raises."""
    failed: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run)
    began_s = last_s = time.perf_counter()
    longest_s = 0.0
    thread.start()
    while not ended.is_set():
        time.sleep(TICK_S)
        now_s = time.perf_counter()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    thread.join()
    if failed:
        raise failed[0]
    return Ticked(longest_s, time.perf_counter() - began_s)
