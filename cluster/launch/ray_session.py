"""Session with a local Ray of our own, removed completely at its end, or with a given cluster. Configures Ray."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ..config import ENVIRONMENT_PREFIX
from ..launch import ray_guard
from ..scratch import Scratch
from .environment import member_environment
from .last_words import cause_of
from .ray_guard import set_variables
from .ray_processes import end_processes

log = logging.getLogger(__name__)

NAMESPACE = "twostroke"
_OBJECT_STORE_BYTES = 80 << 20  # about the smallest size that Ray accepts; no KV goes through the object store
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set for programs that `ray job submit` runs
_RAYS = "r"  # Ray makes its folder writable for every user, so it is inside ours, which only its owner can enter
_STARTS = 3  # attempts to start a Ray of our own: it gives its processes 30 s, which a busy machine may exceed
_TOO_SLOW = "timed out"  # in Ray's words for an attempt whose processes did not answer in time
_LEAVE_S = 1.0
_ANSWER_S = 5.0
_ELSEWHERE = (  # variables that make Ray use another cluster, store, port, folder or environment
    "RAY_ADDRESS",
    "RAY_NAMESPACE",
    "RAY_REDIS_ADDRESS",
    "RAY_GCS_SERVER_PORT",
    "RAY_RUNTIME_ENV",
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_OVERRIDE_RESOURCES",
    "RAY_OVERRIDE_LABELS",
    "RAY_LOG_TO_STDERR",
    "RAY_AUTH_TOKEN",
    _SUBMITTED,
)
_LOG_LIMITS = {  # per file; without them an actor's output has no bound
    "RAY_ROTATION_MAX_BYTES": str(16 << 20),
    "RAY_ROTATION_BACKUP_COUNT": "1",
}


class RaySession:
    """Ray, from `open` to `close` or `abort`. The thread that calls `open` must live as long as Ray."""

    def __init__(self, address: str | None, namespace: str = NAMESPACE) -> None:
        self._address = None if address == "local" else address
        self._namespace = namespace
        self._scratch = Scratch("ts-ray-")  # short: Ray keeps unix sockets below it
        self._opener: threading.Thread | None = None
        self._is_aborted = False
        self._before: dict[str, str | None] = {}

    @property
    def is_joined(self) -> bool:
        """True if the Ray is somebody else's, which may have several machines."""
        return self._address is not None

    @property
    def description(self) -> str:
        """What `open` waits for, for people."""
        if self._address:
            return f"the Ray at {self._address}"
        return "Ray on this machine (mostly 3 to 6 s, up to 90 s where it is busy; --launcher process needs no Ray)"

    def open(self) -> None:
        """Start or join Ray. Takes 3 to 6 seconds, on a busy machine up to a minute and a half.

        Raises:
            ConfigError: Ray did not start or the cluster was not found.
        """
        if self._is_aborted:
            return
        self._opener = threading.current_thread()
        empty = self._scratch.path / "empty"
        try:
            empty.mkdir(exist_ok=True)
            if self._address:
                self._join(self._address, empty)
            else:
                self._start_patiently(self._scratch.path / _RAYS, empty)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error}: pip install 'twostroke[ray]', or use --launcher process") from None
        except Exception as error:
            what = f"the Ray cluster at {self._address} cannot be joined" if self._address else "Ray did not start"
            raise ConfigError(f"{what}: {cause_of(str(error))}; --launcher process needs no Ray") from error

    def close(self) -> None:
        """Shut down what `open` started and remove its files."""
        if self._opener is not None:
            _shut_down()
        self._remove_files()

    def abort(self) -> None:
        """End our own Ray at once, also one that is starting; disconnect from a joined one. Removes our files."""
        self._is_aborted = True
        if self._address:
            leaving = threading.Thread(target=_shut_down, daemon=True)
            leaving.start()
            leaving.join(_LEAVE_S)
        else:
            sys.addaudithook(self._refuse)  # refuse processes and folders that a running `open` would still create
            end_processes(self._scratch.path)
        self._remove_files()

    def _join(self, address: str, empty: Path) -> None:
        import ray

        _check_answers(address)  # Ray itself would try for minutes
        # A submitted job has its own working folder already, and Ray accepts no second one.
        ray.init(address=address, **_common(None if _SUBMITTED in os.environ else empty, self._namespace))

    def _start_patiently(self, folder: Path, empty: Path) -> None:
        """Start Ray, again after an attempt that took too long. Nothing of an attempt that failed is left."""
        for attempt in range(1, _STARTS + 1):
            try:
                self._start(folder, empty)
                return
            except ModuleNotFoundError:
                raise
            except Exception as error:
                if not self._is_aborted:
                    _shut_down()
                    end_processes(self._scratch.path)
                    shutil.rmtree(folder, ignore_errors=True)
                if self._is_aborted or attempt == _STARTS or _TOO_SLOW not in str(error):
                    raise
                log.warning("Ray did not start, trying again: %s", cause_of(str(error)))

    def _start(self, folder: Path, empty: Path) -> None:
        folder.mkdir()
        with self._environment(folder):
            import ray

            ray_guard.read_settings()
            ray_guard.check_token()
            with ray_guard.on_loopback():
                ray.init(
                    address="local",  # never a Ray that runs on this machine already
                    _temp_dir=str(folder),
                    include_dashboard=False,
                    num_cpus=1,  # actors ask for none: cluster/placement.py assigns the threads
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _system_config={"worker_niceness": 0},  # with the default of 15 a busy machine starves workers
                    **_common(empty, self._namespace),
                )
            ray_guard.check_loopback()

    @contextmanager
    def _environment(self, folder: Path) -> Iterator[None]:
        """Set the variables that Ray reads at its start and its processes inherit; the token's remain until `close`."""
        search = member_environment()
        wanted: dict[str, str | None] = {name: search.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
        wanted |= dict.fromkeys(_ELSEWHERE)
        wanted |= {name: None for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)}  # keys may be among them
        wanted |= {"RAY_TMPDIR": str(folder), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        wanted |= {name: os.environ.get(name, limit) for name, limit in _LOG_LIMITS.items()}
        before_token = set_variables(ray_guard.token_settings(self._scratch.path))
        self._before = self._before or before_token  # at a further attempt these would be those of the one before
        before = set_variables(wanted)
        try:
            yield
        finally:
            set_variables(before)

    def _refuse(self, _event: str, _arguments: object) -> None:
        """Audit hook after an abort: every audited action in the thread of `open` fails."""
        if threading.current_thread() is self._opener:
            raise RuntimeError("Ray's start was aborted")

    def _remove_files(self) -> None:
        self._scratch.remove()
        _forget_excepthook()
        if self._before:
            set_variables(self._before)
            self._before = {}
            if "ray" in sys.modules:
                ray_guard.read_settings()  # a Ray that the program uses next gets the program's own settings


def _forget_excepthook() -> None:
    """Remove Ray's hook for uncaught exceptions: without a Ray it tries for a minute, and ends without the error."""
    worker = sys.modules.get("ray._private.worker")
    if worker is not None and sys.excepthook is getattr(worker, "custom_excepthook", None):
        sys.excepthook = worker.normal_excepthook


def _check_answers(address: str) -> None:
    """Check that a server listens at host:port. Other forms of an address are left to Ray.

    Raises:
        OSError: no server answers.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()


def _shut_down() -> None:
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _common(empty: Path | None, namespace: str) -> dict[str, Any]:
    """Options of every `ray.init`.

    Ray puts the working folder and the script's folder of the driver first on its workers' search path, unless the job
    has a working folder of its own. So the job gets the folder `empty`.
    """
    given: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": "ERROR"}
    return given | ({"runtime_env": {"working_dir": str(empty)}} if empty else {})
