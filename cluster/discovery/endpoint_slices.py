"""Addresses of a Kubernetes Service, from its EndpointSlices by list and watch. Drives watching.py in a thread.

A watch ends by the server's clock (`timeoutSeconds`), by ours if that fails, and by a read that is silent for longer
than both. The event loop gets the newest set alone: however many events come, one wake-up waits there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import ConfigError
from ..kubernetes.connection import ApiAway, ApiRefused, answer_of, connect, cut, events_of, opened
from .outage import Outage
from .slices import SERVICE_LABEL, Wanted, slice_of
from .watching import List, Waits, Watch, Watching

log = logging.getLogger(__name__)

GONE, LASTING = 410, (401, 403, 404)  # refusals that the next attempt gets, too
CLOSE_S = 1.0  # for the thread to end; it is a daemon


@dataclass(frozen=True, slots=True)
class Timing:
    """Lengths of watches and waits."""

    watch_s: float = 30.0  # asked of the server, spread up to 1.5 times; a hung one is noticed a margin later
    margin_s: float = 5.0
    waits: Waits = field(default_factory=Waits)


@dataclass(frozen=True, slots=True)
class ServiceAt:
    """A Service and what counts of it."""

    name: str  # as the user gave it
    service: str
    namespace: str
    wanted: Wanted


def _api(connection: Any) -> Any:
    from kubernetes.client import DiscoveryV1Api

    return DiscoveryV1Api(connection)


class EndpointSlices:
    """The addresses of one Service."""

    def __init__(
        self,
        at: ServiceAt,
        timing: Timing | None = None,
        connection: Callable[[], Any] = connect,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`connection`: gives the official client's ApiClient; called in the thread."""
        self.name = at.name
        self._at, self._timing = at, timing or Timing()
        self._connection, self._draw = connection, draw
        self._machine = Watching(at.wanted, self._timing.waits)  # the thread's
        self._outage = Outage()  # the thread's
        self._ending = threading.Event()
        self._open: Any = None  # the response that the thread reads
        self._tell: Callable[[], None] = lambda: None

    @property
    def addresses(self) -> frozenset[str]:
        """The last known ones."""
        return self._machine.addresses

    @property
    def problem(self) -> str:
        """Why they may be out of date, or are none."""
        return self._outage.problem

    async def follow(self) -> AsyncGenerator[frozenset[str], None]:
        """As in `core.discovery.source.AddressSource`. One at a time."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        is_waiting = threading.Event()  # a wake-up is on its way

        def wake() -> None:
            is_waiting.clear()
            news.set()

        def tell() -> None:
            if not is_waiting.is_set():
                is_waiting.set()
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(wake)

        self._tell = tell
        self._ending.clear()
        thread = threading.Thread(target=self._run, name=f"watch {self.name}", daemon=True)
        thread.start()
        told: frozenset[str] | None = None
        try:
            while True:
                await news.wait()
                news.clear()
                if (found := self.addresses) != told:
                    told = found
                    yield found
        finally:
            self._ending.set()
            cut(self._open)
            await asyncio.to_thread(thread.join, CLOSE_S)

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        """List and watch until the end."""
        step: List | Watch = List()
        api: Any = None
        while not self._ending.wait(step.after_s):
            try:
                api = api or _api(self._connection())
                step = self._list(api) if isinstance(step, List) else self._watch(api, step)
            except ConfigError as error:
                step = self._machine.failed(self._draw())
                self._failed(str(error), at_once=True)
            except ApiRefused as error:
                if error.status == GONE:
                    step = self._machine.expired(self._draw())
                    continue
                step = self._machine.failed(self._draw())
                self._failed(self._refusal(error), at_once=error.status in LASTING)
            except (ApiAway, KeyError, TypeError, ValueError) as error:
                step = self._machine.failed(self._draw())
                self._failed(f"Kubernetes' API server does not answer: {error}")
            except Exception as error:  # a thread that ended would leave the addresses as they are for ever
                log.exception("%s: the watch failed", self.name)
                step = self._machine.failed(self._draw())
                self._failed(repr(error))

    def _list(self, api: Any) -> Watch:
        found = answer_of(api.list_namespaced_endpoint_slice, self._at.namespace, label_selector=self._selector())
        slices = [slice_of(item) for item in found.get("items") or ()]
        step = self._machine.listed(slices, str(found["metadata"]["resourceVersion"]))
        self._tell()
        return step

    def _watch(self, api: Any, step: Watch) -> Watch:
        timing, began_s = self._timing, time.monotonic()
        asked_s = round(timing.watch_s * (1 + self._draw() / 2)) or 1
        response = self._open = opened(
            api.list_namespaced_endpoint_slice,
            self._at.namespace,
            label_selector=self._selector(),
            resource_version=step.version,
            watch=True,
            allow_watch_bookmarks=True,
            timeout_seconds=asked_s,
            read_s=asked_s + timing.margin_s,
        )
        try:
            if self._ending.is_set():  # `follow` ended before there was a response to cut
                return step
            self._works()
            for event in events_of(response, asked_s + timing.margin_s):
                self._take(event)
        finally:
            self._open = None
            response.close()
        return self._machine.ended(time.monotonic() - began_s, self._draw())

    def _take(self, event: dict[str, Any]) -> None:
        kind, item = event["type"], event["object"]
        if kind == "ERROR":
            raise ApiRefused(int(item.get("code") or 0), str(item.get("message")))
        version = str(item["metadata"]["resourceVersion"])
        if kind == "BOOKMARK":
            self._machine.bookmarked(version)
        elif kind == "DELETED":
            self._machine.deleted(str(item["metadata"]["name"]), version)
        else:
            self._machine.changed(slice_of(item), version)
        self._works()
        self._tell()

    def _selector(self) -> str:
        return f"{SERVICE_LABEL}={self._at.service}"

    def _refusal(self, error: ApiRefused) -> str:
        if error.status == 403:
            return f"{error}; the pod's account needs get, list and watch of endpointslices (discovery.k8s.io) there"
        return f"Kubernetes' API server refuses: {error}"

    def _failed(self, problem: str, *, at_once: bool = False) -> None:
        line = self._outage.fails(problem, time.monotonic(), at_once=at_once)
        if line is not None:
            log.warning("%s: %s; %d known addresses stay", self.name, line, len(self.addresses))

    def _works(self) -> None:
        if not self.addresses and not self._at.wanted.without_pod:  # the only router of a cluster finds no other
            self._failed(f"the Service {self._at.service} in {self._at.namespace} has no endpoint")
        elif (line := self._outage.works(time.monotonic())) is not None:
            log.info("%s: %s", self.name, line)
