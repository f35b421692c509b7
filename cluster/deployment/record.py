"""Record of a deployment: what another supervisor must know to take the place of one that was killed. No secret in it.

A plan is kept, not made again: the members that live hold memory and GPUs, so the machine would give another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ...engine.config import StepConfig
from ...kv.config import CacheConfig
from ...kv.sizing import PoolSize
from ..config import Config
from ..placement import ModelFacts, Plan, ProcessPlan

FORMAT = 1
_ROUTER = ("max_running", "max_running_tokens", "internal_host")  # settings of the router that a plan decides


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """One member."""

    plan: ProcessPlan
    handle: str | None = None  # of its process, as its launcher names it; None: none runs, or it is being started
    is_going: bool = False  # it goes for good
    frees_place: bool = True  # its place is free then


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A plan, and the settings that it decided."""

    members: tuple[ProcessPlan, ...]
    model: ModelFacts
    pool: PoolSize
    step: dict[str, Any]
    cache: dict[str, Any]
    router: dict[str, Any]
    kernels: str
    ready_timeout_s: float
    spare_gpus: tuple[int, ...]
    free_places: tuple[ProcessPlan, ...]

    @classmethod
    def of(cls, plan: Plan, config: Config) -> PlanRecord:
        """The record of a plan; `config` as `prepare` returned it."""
        found = plan.config
        return cls(
            plan.members,
            plan.model,
            plan.pool,
            found.step.model_dump(mode="json"),
            found.cache.model_dump(mode="json"),
            {name: getattr(found.router, name) for name in _ROUTER},
            config.model.kernels,
            found.cluster.ready_timeout_s,
            plan.spare_gpus,
            plan.free_places,
        )

    def plan(self, config: Config) -> Plan:
        """The plan, for the same settings."""
        update = {
            "step": StepConfig.model_validate(self.step),
            "cache": CacheConfig.model_validate(self.cache),
            "router": config.router.model_copy(update=self.router),
            "cluster": config.cluster.model_copy(update={"ready_timeout_s": self.ready_timeout_s}),
        }
        settled = config.model_copy(update=update)
        return Plan(self.members, self.model, self.pool, settled, (), self.spare_gpus, self.free_places)


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports that clients and members know."""

    http: int
    grpc: int
    internal: tuple[int, ...]  # of each router


@dataclass(frozen=True, slots=True)
class Changing:
    """What changes while a cluster runs."""

    members: Mapping[str, MemberRecord]
    spare_gpus: tuple[int, ...]
    free_places: tuple[ProcessPlan, ...]
    next_numbers: Mapping[str, int]  # of the next worker, by the first part of its name


@dataclass(frozen=True, slots=True)
class Record:
    """A deployment."""

    format: int
    release: str
    deployment: str  # id: random, carried by every member
    launcher: str
    ray_address: str | None  # of a Ray that was joined
    salt: str
    settings: dict[str, str]  # digests (settings.py)
    plan: PlanRecord
    ports: Ports
    now: Changing

    def to_json(self) -> bytes:
        """The record as text."""
        return _RECORD.dump_json(self)

    def with_present(self, now: Changing) -> Record:
        """The same deployment with what has changed."""
        return replace(self, now=now)


class Unreadable(Exception):
    """There is a record, and this release does not understand it."""


_RECORD = TypeAdapter(Record)


def parse(text: bytes) -> Record:
    """The record in `text`.

    Raises:
        Unreadable: it is damaged, or of another release; the message says which.
    """
    try:
        found = _RECORD.validate_json(text)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise Unreadable(f"its record is damaged or of another release (at {where or 'its beginning'})") from None
    if found.format != FORMAT:
        raise Unreadable(f"its record has format {found.format}; this release knows {FORMAT}")
    return found
