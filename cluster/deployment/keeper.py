"""A deployment of this machine: its record in the run folder, written by the one process that has the folder's lock."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...core.errors import ConfigError
from ...core.tls.callers import Caller
from ...core.tls.config import TlsConfig
from ..config import Config
from ..operations.run_folder import RECORD_NAME
from ..placement import Plan
from ..prepare import prepare_again
from .adoption import Adopt, Given, Refuse, decide
from .leftovers import Traces
from .processes import can_outlive, name_of, named_in
from .record import FORMAT, Changing, PlanRecord, Ports, Record, Unreadable, parse
from .settings import digests, has_own_key

KEYS, LOGS = "keys.json", "members"
TracesOf = Callable[[Path, Iterable[str | None]], Sequence[Traces]]
_ID_BYTES = 8
_SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Keys:
    """What is secret of a deployment and was not given but made; for the eyes of its owner alone."""

    key: str | None
    tls: Mapping[Caller, TlsConfig] | None


class Deployment:
    """A cluster whose members outlive its supervisor, new or adopted. Made by `claim`."""

    def __init__(self, folder: Path, given: Config, record: Record | None, living: Mapping[str, str]) -> None:
        """`given`: as the user gave it. `record`, `living` (handles by name): of a deployment that is adopted."""
        self._folder, self._given, self._record = folder, given, record
        self.living = dict(living)
        self._keys = Keys(None, None) if record is None else keys_of(folder)
        self.id = record.deployment if record else secrets.token_hex(_ID_BYTES)
        self.is_adopted = record is not None

    @property
    def name(self) -> str:
        """The name that each member carries."""
        return name_of(self._folder, self.id)

    @property
    def namespace(self) -> str:
        """The namespace of its actors on a Ray."""
        from ..launch.ray_detached import namespace_of

        return namespace_of(self._folder, self.id)

    @property
    def logs(self) -> Path:
        """The folder of the members' logs."""
        folder = self._folder / LOGS
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    @property
    def record(self) -> Record:
        """What is recorded; known after `begin`, and from the first moment of an adopted one."""
        assert self._record is not None, "begin first"
        return self._record

    @property
    def tls(self) -> Mapping[Caller, TlsConfig] | None:
        """Certificates that were made for an adopted deployment; None: none were."""
        return self._keys.tls

    def again(self) -> tuple[Config, Plan]:
        """Configuration and plan of an adopted deployment, as `prepare` returned them when it was started."""
        record, given = self.record, self._given
        if self._keys.key is not None:
            cluster = given.cluster.model_copy(update={"key": self._keys.key})
            given = given.model_copy(update={"cluster": cluster})
        config = prepare_again(given, record.plan.model, record.plan.kernels)
        return config, record.plan.plan(config)

    def begin(
        self, config: Config, plan: Plan, ports: Ports, now: Changing, tls: Mapping[Caller, TlsConfig] | None
    ) -> None:
        """Record a new deployment, before its first member starts. `tls`: certificates that were made for it alone."""
        salt = secrets.token_hex(_SALT_BYTES)
        kept: dict[str, Any] = {} if has_own_key(self._given) else {"key": config.cluster.key}
        if tls is not None:
            kept["tls"] = {caller.value: section.model_dump(mode="json") for caller, section in tls.items()}
        if kept:
            _write(self._folder / KEYS, json.dumps(kept).encode())
        launched = (config.cluster.launcher, config.cluster.ray_address)
        settings = digests(self._given, salt)
        self._record = Record(
            FORMAT, __version__, self.id, *launched, salt, settings, PlanRecord.of(plan, config), ports, now
        )
        self._save()

    def note(self, now: Changing) -> None:
        """Record what has changed, if something has."""
        if now != self.record.now:
            self._record = replace(self.record, now=now)
            self._save()

    def _save(self) -> None:
        _write(self._folder / RECORD_NAME, self.record.to_json())


def outlives(config: Config) -> bool:
    """True if members of a detached cluster outlive its supervisor: child processes on Linux, actors of a joined Ray.

    A Ray of our own ends with the process that started it, and its actors with it.
    """
    if config.cluster.launcher == "ray":
        return config.cluster.ray_address not in (None, "local")
    return config.cluster.launcher == "process" and can_outlive()


def claim(folder: Path, given: Config, traces_of: TracesOf) -> Deployment:
    """Adopt the deployment of a run folder whose lock the caller holds, or make a new one; ends members of dead ones.

    `traces_of`: launch.launchers.traces_of.

    Raises:
        ConfigError: its members live, and cannot be supervised with these settings; with the reason and the remedy.
    """
    port = folder.name
    record, unread = _record_or_reason(folder)
    places = traces_of(folder, (given.cluster.ray_address, record.ray_address if record else None))
    found_at = [(place, place.found()) for place in places]
    found = {handle: deployment for _, there in found_at for handle, deployment in there.items()}
    if unread and found:
        raise ConfigError(_with_remedy(f"{len(found)} members serve without a supervisor, and {unread}", port))
    settings = digests(given, record.salt) if record else {}
    decision = decide(record, found, Given(__version__, given.cluster.launcher, settings))
    if isinstance(decision, Refuse):
        raise ConfigError(_with_remedy(decision.reason, port))
    for place, there in found_at:
        place.end_now([handle for handle in decision.strays if handle in there])
    if isinstance(decision, Adopt):
        return Deployment(folder, given, record, decision.living)
    for name in (RECORD_NAME, KEYS):
        (folder / name).unlink(missing_ok=True)
    return Deployment(folder, given, None, {})


def end_leftovers(folder: Path, drain_s: float, traces_of: TracesOf) -> int:
    """End all members of a run folder whose lock the caller holds; returns how many there were.

    Raises:
        ConfigError: the Ray that they were started on cannot be joined.
    """
    record, _ = _record_or_reason(folder)
    places = traces_of(folder, (record.ray_address if record else None,))
    return sum(place.end_all(record, drain_s) for place in places)


def may_live(folder: Path) -> bool:
    """True if members of a deployment live there, or may live on a Ray."""
    record, _ = _record_or_reason(folder)
    return any(named_in(folder)) or (record is not None and record.launcher == "ray")


def _record_or_reason(folder: Path) -> tuple[Record | None, str]:
    try:
        return read_record(folder), ""
    except Unreadable as error:
        return None, str(error)


def read_record(folder: Path) -> Record | None:
    """The record in a run folder; None: there is none.

    Raises:
        Unreadable: this release does not understand it.
    """
    try:
        return parse((folder / RECORD_NAME).read_bytes())
    except OSError:
        return None


def keys_of(folder: Path) -> Keys:
    """The keys that were made for a deployment.

    Raises:
        ConfigError: they are damaged.
    """
    try:
        found = json.loads((folder / KEYS).read_bytes())
        tls = found.get("tls")
        certificates = tls and {Caller(name): TlsConfig.model_validate(values) for name, values in tls.items()}
        return Keys(found.get("key"), certificates)
    except FileNotFoundError:
        return Keys(None, None)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            _with_remedy(f"{folder / KEYS} cannot be read ({type(error).__name__})", folder.name)
        ) from None


def _with_remedy(reason: str, port: str) -> str:
    return (
        f"the cluster at port {port} is left as it is: {reason}. Start with what it was started with, or end it first: "
        f"`twostroke down --grpc 127.0.0.1:{port}`"
    )


def _write(file: Path, text: bytes) -> None:
    """Replace a file at once, for its owner alone."""
    new = file.with_suffix(".new")
    with open(new, "wb", opener=_for_owner) as opened:
        opened.write(text)
    new.rename(file)


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
