"""An engine without weights in a process of its own: `python engine_process.py FD` serves the socket FD."""

import socket
import sys

from twostroke.core.clock import MonotonicClock
from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.process_link import serve_engine
from twostroke.engine.link.thread_link import ThreadLink
from twostroke.engine.loop import Engine
from twostroke.engine.plan import StepPlan, StepResult
from twostroke.engine.policy import StepLimits
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache


class Counting:
    """Every sampled token is the position that it was sampled at."""

    def warm_up(self) -> None:
        pass

    def run(self, plan: StepPlan) -> StepResult:
        return StepResult(plan.step, tuple((step.end,) if step.samples else () for step in plan.sequences))


def main(sock: socket.socket) -> None:
    link, pool = ThreadLink(), BlockPool(64, 16)
    core = EngineCore(CoreLimits(), pool, PrefixCache(pool), combined_policy(StepLimits()), eos_ids=[], key=b"cluster")
    engine = Engine(core, Counting(), None, link, MonotonicClock())
    carrying = serve_engine(sock, link)
    engine.start()
    engine.join(600)
    carrying.join(10)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
