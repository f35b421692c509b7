"""What a joined Ray's autoscaler is asked for: room for all wanted workers, the whole of it each time.

`request_resources` sets one floor for the whole Ray, whoever calls it. So one deployment of a Ray asks at a time: the
one whose actor has the name below. That actor ends with the process that made it, and then another may ask.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..placement import ProcessPlan
from ..wanted import Bundle, bundles_of, told
from .last_words import cause_of
from .ray_nodes import living_nodes

ANSWER_S = 3.0
RESTATE_S = 30.0  # a Ray whose head has restarted may have forgotten
OWNER, SHARED_NAMESPACE = "asks-for-nodes", "twostroke"
_ASKED_BY = b"twostroke:asks-for-nodes"  # in Ray's store: namespace of the deployment that asked last


class Wishes:
    """What one deployment asks of its Ray."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._me = f"{namespace} {os.urandom(4).hex()}"
        self._owner: Any = None
        self._is_ours = False  # what Ray was asked for last
        self._stated: list[Bundle] | None = None
        self._stated_at_s = 0.0
        self._said = ""
        self._asking: asyncio.Task[str] | None = None

    async def state(self, workers: Sequence[ProcessPlan], nodes: Mapping[str, str]) -> str:
        """Ask for room for these workers. `nodes`: where those that run are. Returns what was asked, or why not.

        Waits a few seconds at most; while Ray's head is away, one call waits for it and no other is begun.
        """
        if self._asking is None:
            located = [(worker, nodes.get(worker.name, worker.node)) for worker in workers]
            self._asking = asyncio.create_task(asyncio.to_thread(self._state, located))
        done, _ = await asyncio.wait({self._asking}, timeout=ANSWER_S)
        if not done:
            return "Ray does not answer; it is asked for room when it does"
        asked, self._asking = self._asking, None
        error = asked.exception()
        if error is not None:
            self._stated = None
        self._said = f"Ray cannot be asked for room: {cause_of(str(error))}" if error else asked.result()
        return self._said

    def withdraw(self) -> None:
        """Ask for nothing any more. Blocks for a moment."""
        if self._is_ours:
            _request([])
            _store("_internal_kv_del", _ASKED_BY)
            self._is_ours = False

    def _state(self, located: list[tuple[ProcessPlan, str]]) -> str:
        cpus_of = {node.name: node.num_cpus for node in living_nodes()}
        bundles = bundles_of([replace(worker, node=node) for worker, node in located], cpus_of)
        is_old = time.monotonic() - self._stated_at_s > RESTATE_S
        if bundles == self._stated and not is_old:
            return self._said
        if owner := self._other_owner():
            self._stated, self._is_ours = None, False
            return f"Ray is not asked for room, because the deployment {owner} asks it"
        _store("_internal_kv_put", _ASKED_BY, self._namespace.encode(), overwrite=True)
        self._is_ours = True
        _request(bundles)
        self._stated, self._stated_at_s = bundles, time.monotonic()
        return f"Ray is asked for room for {len(bundles)} workers: {told(bundles)}"

    def _other_owner(self) -> str:
        """Become the one who asks this Ray. Returns who is instead; empty: we are."""
        import ray

        if self._owner is not None:
            try:
                ray.get(self._owner.who.remote(), timeout=ANSWER_S)
            except ray.exceptions.RayError:
                self._owner = None
            else:
                return ""
        try:
            self._owner = _owner_kind().remote(self._me)
        except ValueError:  # the name is taken, perhaps by our own that did not answer
            other = ray.get_actor(OWNER, namespace=SHARED_NAMESPACE)
            who = str(ray.get(other.who.remote(), timeout=ANSWER_S))
            if who != self._me:
                return who.partition(" ")[0]
            self._owner = other
        return ""


def withdraw_of(namespaces: str) -> None:
    """Withdraw what a deployment asked for whose namespace begins so, if nobody asks for it any more. Ray is joined."""
    import ray

    asked_by = _store("_internal_kv_get", _ASKED_BY)
    if not asked_by or not asked_by.decode().startswith(namespaces):
        return
    try:
        ray.get_actor(OWNER, namespace=SHARED_NAMESPACE)
    except ValueError:
        _request([])
        _store("_internal_kv_del", _ASKED_BY)


def _request(bundles: list[Bundle]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def _store(call: str, *arguments: Any, **named: Any) -> Any:
    """A call to Ray's store of keys and values, which its type stubs do not declare."""
    return getattr(importlib.import_module("ray.experimental.internal_kv"), call)(*arguments, **named)


def _owner_kind() -> Any:
    """An actor's class that says who made it. Made here, so that its process imports nothing of ours."""
    import ray

    class AsksForNodes:
        """Exists as long as who made it."""

        def __init__(self, who: str) -> None:
            self._who = who

        def who(self) -> str:
            """The namespace of the deployment that asks, and a name of its process."""
            return self._who

    remote: Any = ray.remote
    return remote(num_cpus=0, max_restarts=0)(AsksForNodes).options(name=OWNER, namespace=SHARED_NAMESPACE)
