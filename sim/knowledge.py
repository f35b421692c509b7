"""Checks that routers and workers agree on running choices and on cached blocks. Reads state, never changes it."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from ..decode_worker.task import DecodeTask
from ..router.routing.facts import WorkerKey
from .invariants import Violation
from .network import End
from .router import RouterNode
from .workers.node import WorkerNode
from .world import World

SLACK_S = 0.05


class Idleness:
    """Check of R8: a worker stops a choice that its router does not wait for as soon as the cancel can arrive.

    So at most one worker computes a choice, because a router waits for one dispatch. A run whose session is lost, or
    whose session lost a message to the worker, is not checked here: R7 checks that its grace ends it.
    """

    def __init__(self, world: World, routers: Mapping[str, RouterNode]) -> None:
        self._world = world
        self._routers = routers
        self._due_s: WeakKeyDictionary[DecodeTask, float] = (
            WeakKeyDictionary()
        )  # unwanted runs: latest time of their end

    def check(self, node: WorkerNode) -> None:
        """Check the runs of a worker after an event on it."""
        now_s, frozen_s = self._world.now_s(), node.process.frozen_s
        slack_s = SLACK_S + node.worker.step_s[1] + 2 * node.worker.link_s  # the step under way ends first
        for run in node.service.runs:
            if run._verdict is not None:
                continue
            road = self._road_to(node, run)
            if road is None or road.peer.num_lost:
                self._due_s.pop(run, None)
                continue
            due_s = self._due_s.setdefault(run, max(now_s, road.arrival_s) + slack_s - frozen_s)
            if now_s > due_s + frozen_s:
                raise Violation("R8", f"{node.process} computes {run.order.key} for nobody")

    def _road_to(self, node: WorkerNode, run: DecodeTask) -> End | None:
        """Worker's end of the session for the router's cancel. None: the router wants the run, or cannot cancel it."""
        key = WorkerKey(node.worker.worker_id, node.process.life)
        owner = node.service._ledger.router_of(run)
        router = self._routers.get(owner.router_id)
        if router is None or router.incarnation != owner.incarnation or not router.process.is_alive:
            return None
        if router.waits_for(key, run.order.key, run.order.epoch):
            return None
        link = router.links.get(key)
        session = None if link is None else link.session
        face = next((face for face in node.sessions if face.session.outbox is run._outbox), None)
        if session is None or face is None or session.peer is not face._end or session.is_deaf:
            return None
        return face._end


def check_beliefs(router: RouterNode, node: WorkerNode) -> None:
    """Check K5: a router that received all events knows a worker's blocks exactly; fewer only if its map was full."""
    link = router.links.get(WorkerKey(node.worker.worker_id, node.process.life))
    watch = None if link is None else link.watch
    face = next((face for face in node.watches if watch is not None and face._end is watch.peer), None)
    if watch is None or face is None or watch.is_deaf or watch.peer.num_lost or not face.is_up_to_date:
        return
    believed = router.roster.prefixes.believed(node.worker.worker_id)
    held = {bytes(identity) for identity in node.engine.prefix.snapshot()}
    if believed is None or node.engine.has_waiting_commands:
        return
    if believed - held:
        raise Violation("K5", f"{router.process} believes {len(believed - held)} blocks that {node.process} lacks")
    if held - believed and not router.roster.prefixes.num_dropped:
        raise Violation("K5", f"{router.process} does not know {len(held - believed)} blocks of {node.process}")
