"""Commands to a running cluster over a socket of the file system, for the user that runs it alone.

One line of JSON asks: {"verb": ..., ...}. Lines of JSON answer: {"said": ...} while it goes on, at the end
{"code": 0 | 1 | 2, "said": ...}: done, done with streams that were moved, refused or failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
from collections.abc import Callable
from os import getuid
from pathlib import Path
from typing import Any, NamedTuple

from ...core.errors import ConfigError, InvalidRequest, TwostrokeError, Unavailable
from ...core.request import Role
from .changes import Changes, Say
from .departures import Departures
from .standins import check_stand_in

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 64 << 10
ASK_S = 5.0  # for the line that asks, and for an answer that waits for nothing
MAX_DRAIN_S = 86_400.0
_UCRED = struct.Struct("3i")  # pid, uid, gid


class Answer(NamedTuple):
    """How a command ended."""

    code: int
    said: str


class Control:
    """Takes commands for one cluster, from `start` to `close`."""

    def __init__(self, changes: Changes, workers: Callable[[], list[dict[str, Any]]], stop: Callable[[], None]) -> None:
        """`workers`: the router's reports on them. `stop`: begins the end of the whole cluster."""
        self._changes, self._workers, self._stop = changes, workers, stop
        self._departures = Departures(changes)
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self.is_ready = False  # the cluster serves

    async def start(self, path: Path) -> None:
        """Listen at `path`, in a folder that only its owner can enter."""
        path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, path, limit=MAX_LINE_BYTES)
        path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening, and cancel commands under way."""
        if self._server is not None:
            self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)

        def say(line: str) -> None:
            writer.write(json.dumps({"said": line}).encode() + b"\n")  # a few hundred lines at most

        try:
            if _is_owner(writer.get_extra_info("socket")):
                answer = await self._answer(reader, say)
                writer.write(json.dumps(answer._asdict()).encode() + b"\n")
                async with asyncio.timeout(ASK_S):
                    await writer.drain()
        except (OSError, TimeoutError):
            log.debug("who asked is gone")
        finally:
            self._serving.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, say: Say) -> Answer:
        try:
            async with asyncio.timeout(ASK_S):
                asked = json.loads(await reader.readline())
            return await self._do(asked, say)
        except (ValueError, TimeoutError, AttributeError, KeyError, TypeError) as error:
            return Answer(2, f"this is no command: {type(error).__name__}")
        except TwostrokeError as error:
            return Answer(2, str(error))

    async def _do(self, asked: dict[str, Any], say: Say) -> Answer:
        """Carry out a command.

        Raises:
            TwostrokeError: it is refused, or failed.
        """
        verb = asked["verb"]
        if verb == "state":
            return Answer(0, "serves" if self.is_ready else "starts")
        if verb == "stop":
            self._stop()
            return Answer(0, "it stops")
        if not self.is_ready:
            raise Unavailable("the cluster is still starting", retry_after_s=5.0)
        if verb == "drain":
            return await self._drain(str(asked["worker"]), float(asked["timeout_s"]), bool(asked.get("force")), say)
        if verb == "undrain":
            await self._departures.take_back(str(asked["worker"]))
            return Answer(0, f"{asked['worker']} takes work again")
        if verb == "restart":
            moved = await self._changes.restart_all(say, force=bool(asked.get("force")))
            what = f"; {moved} streams went on at other workers" if moved else ""
            return Answer(0, f"every worker was restarted{what}")
        raise InvalidRequest(f"{verb!r} is no command; there are: state, drain, undrain, restart, stop")

    async def _drain(self, name: str, timeout_s: float, force: bool, say: Say) -> Answer:
        if not 0 <= timeout_s <= MAX_DRAIN_S:
            raise InvalidRequest(f"the timeout is {timeout_s:g} s; must be from 0 to {MAX_DRAIN_S:g}")
        # The router's report may be a second old: who goes already stands in for nobody.
        workers = [w for w in self._workers() if w["worker_id"] == name or self._changes.is_serving(w["worker_id"])]
        if any(worker["worker_id"] == name and worker["role"] != Role.PREFILL.value for worker in workers):
            check_stand_in(workers, name, "a drained worker", force=force)
        retired = await self._departures.send_away(name, timeout_s, say)
        if retired is None:
            return Answer(1, f"{name} stays: its drain was undone")
        return told(name, retired.num_moved, retired.error, "its process is gone")


def told(name: str, num_moved: int, error: str, then: str) -> Answer:
    """The end of a drain."""
    if error:
        return Answer(1, f"{name} did not drain ({error}); {then}")
    if num_moved:
        return Answer(1, f"{name}: {num_moved} streams had not ended in time and go on at other workers; {then}")
    return Answer(0, f"{name} is drained: everything ended by itself; {then}")


def _is_owner(peer: socket.socket) -> bool:
    """True if the process at the other end belongs to our user, as the system says."""
    _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(uid == getuid())


async def command(path: Path, asked: dict[str, Any], say: Say, timeout_s: float) -> Answer:
    """Send a command to the cluster whose socket is at `path`, and wait for its end.

    Raises:
        ConfigError: nobody listens there.
        Unavailable: no answer within `timeout_s`, or the cluster ended meanwhile.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE_BYTES)
    except OSError as error:
        raise ConfigError(f"nobody takes commands at {path}: {error.strerror or error}") from None
    try:
        async with asyncio.timeout(timeout_s):
            writer.write(json.dumps(asked).encode() + b"\n")
            while line := await reader.readline():
                heard = json.loads(line)
                if "code" in heard:
                    return Answer(int(heard["code"]), str(heard["said"]))
                say(str(heard["said"]))
    except TimeoutError:
        raise Unavailable(f"the cluster did not answer within {timeout_s:g} s", retry_after_s=5.0) from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    raise Unavailable("the cluster ended before it answered", retry_after_s=5.0)
