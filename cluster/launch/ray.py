"""Launcher of members as Ray actors: Ray places, names and ends them; only the supervisor restarts them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...core.errors import TwostrokeError, Unavailable
from ...core.hosted import Hosted
from ...core.process_settings import uncollected
from ...core.request import Role
from ...core.tls.callers import Caller
from ...core.tls.config import TlsConfig
from ...decode_worker.actor import DecodeWorker
from ...prefill_worker.actor import PrefillWorker
from ...router.actor import Router
from ...router.config import RouterConfig
from ...worker.settings import WorkerSettings
from ..nodes import Node, stand_in
from ..placement import ProcessPlan
from .last_words import ProcessEnd, cause_of, end_of_error
from .launcher import Ended, Site, worker_settings
from .ray_detached import lives, named_actor
from .ray_nodes import answering_nodes, living_nodes, on_node
from .ray_session import NAMESPACE, RaySession
from .ray_wanted import Wishes

if TYPE_CHECKING:
    from ...router.process import RouterProcess
    from ...worker.process import WorkerProcess

log = logging.getLogger(__name__)

_WITHDRAW_S = 0.5
_KILL_S = 3.0
_NODES_S = 20.0  # for all nodes to say what they have free
_CALLERS = 4  # calls at once that may wait for Ray's head


class RayLauncher:
    """One named actor per member, on a local Ray of our own or a given cluster.

    Those of a deployment are detached, in a namespace of its own: they outlive this process. Others end with it.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._session = RaySession(site.config.cluster.ray_address, site.namespace or NAMESPACE)
        self._wishes = Wishes(site.namespace or NAMESPACE)
        self._opened = self._is_opening = False
        self._executor = ThreadPoolExecutor(1, "ray")  # Ray's processes end with the thread that started them
        self._callers = ThreadPoolExecutor(_CALLERS, "ray-call")
        self._actors: dict[str, Any] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._nodes: dict[str, str] = {}  # of each member, now or last
        self._handles: dict[str, str] = {}

    async def start(self, member: ProcessPlan, ended: Ended) -> None:
        """Create the actor; it starts serving in its constructor."""
        await self._open()
        name = f"{member.name}-{os.urandom(3).hex()}"  # the name of a dead actor stays in use for a while
        try:
            # Each call waits for Ray's head where that is away. Serving needs no call, so nothing else waits here.
            actor = await asyncio.get_running_loop().run_in_executor(self._executor, self._placed, member, name)
        except TwostrokeError:
            raise
        except Exception as error:  # Ray has several kinds for a head that is away
            raise Unavailable(f"Ray does not start it: {cause_of(str(error))}", retry_after_s=5.0) from error
        self._handles[member.name] = f"{self._site.namespace} {name}"
        self._watch_from_now(member.name, actor, ended)

    def _placed(self, member: ProcessPlan, name: str) -> Any:
        if member.node:
            member = self._on_living_node(member)
        self._nodes[member.name] = member.node
        return self._create(member, name)

    async def _open(self) -> None:
        if not self._opened:
            self._is_opening = True
            try:
                await asyncio.get_running_loop().run_in_executor(self._executor, self._session.open)
            finally:
                self._is_opening = False
            self._opened = True

    def _watch_from_now(self, name: str, actor: Any, ended: Ended) -> None:
        self._actors[name] = actor
        self._watchers[name] = asyncio.create_task(self._watch(name, actor, ended))

    async def adopt(self, member: ProcessPlan, handle: str, ended: Ended) -> bool:
        """Take over a detached actor, by its name. False: it has ended."""
        await self._open()
        self._nodes[member.name] = member.node
        try:
            actor = await asyncio.to_thread(named_actor, handle)
        except ValueError:
            return False
        if not await asyncio.to_thread(lives, actor):
            return False
        self._handles[member.name] = handle
        self._watch_from_now(member.name, actor, ended)
        return True

    def handle(self, name: str) -> str | None:
        """The actor's namespace and name. None: it does not run, or ends with this process."""
        return self._handles.get(name) if self._site.member_name else None

    def is_stopped(self, _: str) -> bool:
        """Always False: an actor may be on another machine."""
        return False

    async def stop(self, name: str, grace_s: float) -> None:
        """Ask an actor to drain, and kill it afterwards."""
        actor, watcher = self._actors.get(name), self._watchers.get(name)
        if actor is None or watcher is None:
            return
        import ray

        try:
            async with asyncio.timeout(2.0):
                await _settled(actor.stop.remote())
            async with asyncio.timeout(grace_s + 5.0):
                await asyncio.shield(watcher)
        except (TimeoutError, ray.exceptions.RayError):
            pass  # it hangs or has ended already; in both cases it is killed below
        await self._end(actor)

    async def kill(self, name: str) -> None:
        """Make Ray kill the actor's process."""
        if name in self._actors:
            await self._end(self._actors[name])

    async def _end(self, actor: Any) -> None:
        """Make Ray kill an actor. Where its head is away that happens when it is back, and is not waited for."""
        import ray

        kill = functools.partial(ray.kill, actor, no_restart=True)
        killing = asyncio.get_running_loop().run_in_executor(self._callers, kill)
        done, _ = await asyncio.wait({killing}, timeout=_KILL_S)
        if done and (error := killing.exception()) is not None:
            log.warning("Ray did not end an actor: %s", cause_of(str(error)))

    async def machines(self) -> list[Node]:
        """The nodes of a joined Ray that answer now. Empty on a Ray of our own."""
        if not self._session.is_joined:
            return []
        asking = asyncio.get_running_loop().run_in_executor(self._callers, answering_nodes)
        done, _ = await asyncio.wait({asking}, timeout=_NODES_S)
        error = asking.exception() if done else TimeoutError(f"no answer within {_NODES_S:g} s")
        if error is not None:
            log.warning("Ray does not say what its nodes have free: %s", cause_of(str(error)))
            return []
        return asking.result()

    async def want(self, workers: Sequence[ProcessPlan]) -> str:
        """Ask the autoscaler of a joined Ray for room for all these workers."""
        return await self._wishes.state(workers, self._nodes) if self._session.is_joined else ""

    async def close(self) -> None:
        """Stop all actors, shut our Ray down and remove its files."""
        await asyncio.gather(*(self.stop(name, 0.0) for name in list(self._actors)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WITHDRAW_S):
                await asyncio.to_thread(self._wishes.withdraw)
        await asyncio.get_running_loop().run_in_executor(self._executor, self._session.close)
        self._opened = False
        self._executor.shutdown(wait=False)
        self._callers.shutdown(wait=False)

    async def abort(self) -> None:
        """End our own Ray with all its processes; disconnect from a joined one, which then ends our actors."""
        for watcher in self._watchers.values():
            watcher.cancel()
        if self._site.member_name:  # nobody else would end them
            await asyncio.gather(*(self.kill(name) for name in list(self._actors)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WITHDRAW_S):
                await asyncio.to_thread(self._wishes.withdraw)
        await asyncio.to_thread(self._session.abort)
        self._executor.shutdown(wait=False)

    async def leave(self) -> None:
        """Watch the actors no more."""
        for watcher in self._watchers.values():
            watcher.cancel()

    def opening(self) -> str:
        """Ray, while it starts or is joined."""
        return self._session.description if self._is_opening else ""

    def said(self, _: str) -> str:
        """Always empty: the output of actors is in Ray's own files."""
        return ""

    def _create(self, member: ProcessPlan, name: str) -> Any:
        site, grace_s = self._site, self._site.config.cluster.drain_timeout_s
        if member.kind == "router":
            settings = site.router_settings(member)
            reads_defaults = site.config.model.generation_config == "auto"
            tls = site.tls_of(Caller.ROUTER)
            build = _BuildRouter(settings, site.config.cluster.key, reads_defaults=reads_defaults, tls=tls)
            return self._options(Router, member, name).remote(build, grace_s)
        kind = PrefillWorker if member.role is Role.PREFILL else DecodeWorker
        worker = worker_settings(site, member)
        if member.node:
            worker = worker.model_copy(update={"gpu": 0})  # the process sees no other than its own
        return self._options(kind, member, name).remote(_BuildWorker(worker), grace_s)

    def _options(self, kind: type[Hosted], member: ProcessPlan, name: str) -> Any:
        return _actor(kind, member, name, is_detached=bool(self._site.member_name))

    def _on_living_node(self, member: ProcessPlan) -> ProcessPlan:
        """The member on its node; if that is gone, on another (nodes.py).

        Routers stay where they are, because workers look for them there.
        """
        living = living_nodes()
        if member.kind == "router" or any(node.name == member.node for node in living):
            return member
        chosen = stand_in(living, Counter(self._nodes[name] for name in self._actors), member.device)
        if chosen is None:
            return member
        log.warning("%s moves to %s, because its node is gone", member.name, chosen.address)
        return replace(member, node=chosen.name, host=chosen.address)

    async def _watch(self, name: str, actor: Any, ended: Ended) -> None:
        import ray

        try:
            end = ProcessEnd(str(await _settled(actor.run.remote())))
        except ray.exceptions.RayError as error:
            end = end_of_error(str(error))
        if self._site.member_name:  # a detached actor's process stays when its server has ended
            await self._end(actor)
        if self._actors.get(name) is actor:
            del self._actors[name], self._watchers[name]
            self._handles.pop(name, None)
        ended(name, end)


class _BuildRouter:
    """Factory of a router, pickled to the actor's process and called there: only that process imports the router."""

    def __init__(self, settings: RouterConfig, key: str, *, reads_defaults: bool, tls: TlsConfig | None) -> None:
        self._settings, self._key, self._reads_defaults, self._tls = settings, key, reads_defaults, tls

    def __call__(self) -> RouterProcess:
        with uncollected():
            from ...router.process import RouterProcess

        return RouterProcess(self._settings, self._key, reads_defaults=self._reads_defaults, tls=self._tls)


class _BuildWorker:
    """Factory of a worker, pickled to the actor's process and called there: only that process imports the engine."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings

    def __call__(self) -> WorkerProcess:
        from ...checkpoint.locate import located_on_node

        with uncollected():
            from ...worker.main import prepare_process
            from ...worker.process import WorkerProcess

        prepare_process()
        update: dict[str, object] = {"model_directory": str(located_on_node(self._settings.model_directory))}
        guesses = self._settings.speculation
        if guesses.checkpoint is not None:
            draft = str(located_on_node(guesses.checkpoint, "speculation.model"))
            update["speculation"] = guesses.model_copy(update={"model": draft})
        return WorkerProcess(self._settings.model_copy(update=update))


def _actor(kind: type[Hosted], member: ProcessPlan, name: str, *, is_detached: bool) -> Any:
    """The actor class with our options; `stop` and `pid` answer while `run` blocks."""
    import ray

    remote: Any = ray.remote  # its stubs do not know concurrency groups
    control = ray.method(concurrency_group="control")
    remote_kind = type(kind.__name__, (kind,), {"stop": control(_stop), "pid": control(_pid)})
    return remote(concurrency_groups={"control": 2})(remote_kind).options(
        name=name,
        lifetime="detached" if is_detached else None,
        num_cpus=0,
        # On a joined Ray, others may want GPUs too, so it counts and assigns them. On our own we place them ourselves
        # (settings.gpu), and Ray must not hide them from an actor that asked for none.
        num_gpus=member.gpu_share if member.node and member.device == "cuda" else 0,
        max_restarts=0,
        max_task_retries=0,
        **on_node(member.node),
        runtime_env={
            "env_vars": {"OMP_NUM_THREADS": str(member.num_threads), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        },
    )


def _stop(self: Hosted) -> None:
    Hosted.stop(self)


def _pid(self: Hosted) -> int:
    return Hosted.pid(self)


async def _settled(reference: Any) -> Any:
    return await asyncio.wrap_future(reference.future())
