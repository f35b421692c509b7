"""The whole configuration: one schema for flags, environment, file and Helm values.

Order of precedence: flags, environment (`TWOSTROKE__SECTION__KEY`), file (`--config FILE`, YAML), defaults.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator

from ..checkpoint.config import ModelConfig
from ..core.config import Section, load_section
from ..core.errors import ConfigError
from ..core.lease import ORPHAN_GRACE_S
from ..core.ports import bindable_host
from ..core.request import Role
from ..core.tls.config import TlsConfig
from ..engine.config import SpeculationConfig, StepConfig
from ..kv.config import CacheConfig
from ..router.config import RouterConfig
from ..worker.settings import GpuHealth
from .planner.config import PlannerConfig

ENVIRONMENT_PREFIX = "TWOSTROKE__"
MAX_ROUTERS = 64
STDIN = Path("-")  # as a configuration file: a configuration with keys need not be stored in a file


MetricsPort = Annotated[
    Annotated[int, Field(ge=0, le=65535)] | None, BeforeValidator(lambda value: None if value == "none" else value)
]
"""A port, 0 for any, or the word "none" (YAML's null) for no port."""


class ClusterConfig(Section):
    """Number of workers per role, launcher, and timeouts of the processes."""

    prefill: int = Field(1, ge=0, le=64, description="prefill workers; 0: combined workers, no disaggregation")
    decode: int = Field(1, ge=1, le=64, description="decode workers (combined ones when prefill is 0)")
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="ranks of each worker: processes that share one model's layers by heads and columns; 1 on GPUs",
    )
    prefill_tp: int | None = Field(None, ge=1, le=64, description="ranks of a prefill worker; none: as the others")
    decode_tp: int | None = Field(None, ge=1, le=64, description="ranks of a decode worker; none: as the others")
    routers: int = Field(
        1, ge=1, le=MAX_ROUTERS, description="routers on this machine; several share router.port and grpc_port"
    )
    launcher: Literal["ray", "process", "inprocess"] = Field(
        "ray",
        description="who starts the members: Ray, which may span machines; process: this machine's processes, without "
        "Ray; inprocess: threads of one process, for tests",
    )
    key: str = Field(
        default_factory=lambda: secrets.token_hex(16),
        min_length=16,
        repr=False,
        description="shared secret of all processes: they prove it to each other; keys block identities and digests",
    )
    tls: TlsConfig | None = Field(
        None, description="certificates of the gRPC links between routers and workers; none: they use loopback only"
    )
    ready_timeout_s: float = Field(
        120.0, gt=0, description="for a member to serve; default: 120, and the time to read the weights at 100 MiB/s"
    )
    replace_after_s: float = Field(20.0, gt=0, description="how long a frozen or unreachable member is waited for")
    drain_timeout_s: float = Field(10.0, ge=0, description="how long answers may go on when a member is told to stop")
    orphan_grace_s: float = Field(ORPHAN_GRACE_S, ge=0, le=60, description="how long a lost router's requests run on")
    ray_address: str | None = Field(
        None, description="join this Ray cluster; none: a local one of our own, whatever RAY_ADDRESS says"
    )
    worker_metrics_port: MetricsPort = Field(
        0, description="GET /metrics and /health of the first worker, each next one +1; 0: any, none: off"
    )

    gpu_health: GpuHealth = Field(
        "auto",
        description="watch the GPUs through NVML (docs/gpu_health.md); auto: those that workers compute on; on: also "
        "beside models on the CPU; off: leave it to others",
    )

    def ranks_of(self, role: Role) -> int:
        """Tensor-parallel ranks of a worker of this role. A combined worker decodes."""
        of_role = self.prefill_tp if role is Role.PREFILL else self.decode_tp
        return of_role or self.tensor_parallel_size

    @field_validator("key", mode="before")
    @classmethod
    def _is_given(cls, key: object) -> object:
        if key is None:
            raise ValueError("it is empty; give the secret of 16 characters or more that all processes share")
        return key

    @field_validator("key")
    @classmethod
    def _is_bare(cls, key: str) -> str:
        if key != key.strip():
            raise ValueError("it begins or ends with a blank or a line end, which another process's may not; remove it")
        return key


class Config(Section):
    """All settings; each section belongs to one part."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    step: StepConfig = StepConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    router: RouterConfig = RouterConfig()
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    planner: PlannerConfig = PlannerConfig()

    @property
    def num_places(self) -> int:
        """Most workers that there ever are: the planner's, or as many as are configured."""
        configured = self.cluster.prefill + self.cluster.decode
        return max(configured, self.planner.max_workers or 0) if self.planner.enabled else configured


def load_config(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Join file, environment and flags (dotted keys such as "cluster.prefill"; None means not given).

    Raises:
        ConfigError: unknown key (names the nearest), impossible value, or a file that cannot be read.
    """
    values = _read_file(file) if file else {}
    overrides = [*_from_environment(environment or {}), *((k, v) for k, v in (flags or {}).items() if v is not None)]
    for path, value in overrides:
        _put(values, path.split("."), value)
    config = load_section(Config, values)
    _check(config)
    return config


def _read_file(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(sys.stdin.read() if file == STDIN else file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file}: {_yaml_mistake(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(
            f"--config {file}: the top level must be a mapping of sections, e.g. 'cluster: {{prefill: 2}}'"
        )
    return values or {}


def _yaml_mistake(error: yaml.YAMLError) -> str:
    """Description and position of a YAML error, without the line itself, which may hold a key."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or "it is no YAML"
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what


def _from_environment(environment: Mapping[str, str]) -> Iterable[tuple[str, Any]]:
    for name, text in sorted(environment.items()):
        if name.startswith("TWOSTROKE_") and "__" in name and not name.startswith(ENVIRONMENT_PREFIX):
            right = ENVIRONMENT_PREFIX + name.removeprefix("TWOSTROKE_")
            raise ConfigError(f"the environment variable {name} is not a setting; did you mean {right}?")
        if name.startswith(ENVIRONMENT_PREFIX):
            if not text.strip():  # not "unset": an empty list of keys would open a cluster to everybody
                raise ConfigError(f"the environment variable {name} is empty; unset it, or give it a value")
            path = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            try:
                yield path, yaml.safe_load(text)
            except yaml.YAMLError:
                yield path, text


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    *parents, last = path
    for index, part in enumerate(parents):
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            where = ".".join(parents[: index + 1])  # the value is not shown, because it may be a key
            raise ConfigError(f"{'.'.join(path)} is not a setting; {where} is given as one value, without keys in it")
        values = inner
    values[last] = value


def _check(config: Config) -> None:
    router = config.router
    if not router.insecure:
        bindable_host(router.host, "router.host", insecure=router.may_be_public)
        bindable_host(router.internal_host, "router.internal_host", insecure=config.cluster.tls is not None)
    ports = [port for port in (router.port, router.grpc_port, router.internal_port) if port]
    if len(set(ports)) != len(ports):
        raise ConfigError(
            f"router.port is {router.port}, router.grpc_port {router.grpc_port}, router.internal_port "
            f"{router.internal_port}; they must differ (--port, --grpc-port)"
        )
    if router.runtime_lora and not config.model.serves_adapters:
        raise ConfigError("router.runtime_lora is true and model.enable_lora false; turn that on, too")
    _check_router_ports(config)
    _check_pairs(config)
    _check_planner(config)
    ranks = config.cluster.ranks_of(Role.DECODE)
    if config.speculation.method is not None and ranks > 1:
        raise ConfigError(
            f"speculation.method is {config.speculation.method!r} and decode workers have {ranks} tensor-parallel "
            "ranks; speculation is served on one rank in this release: leave one of the two out"
        )
    largest = config.step.max_num_batched_tokens
    if largest < config.cache.block_size:
        raise ConfigError(
            f"step.max_num_batched_tokens is {largest}; must be at least cache.block_size ({config.cache.block_size})"
        )


def _check_router_ports(config: Config) -> None:
    """Refuse internal ports of several routers that another port of theirs is among, or that end above 65535."""
    router, number = config.router, config.cluster.routers
    if number == 1 or not router.internal_port:
        return
    ports = range(router.internal_port, router.internal_port + number)
    taken = [port for port in (router.port, router.grpc_port) if port in ports]
    if taken or ports[-1] > 65535:
        what = f"the routers share {taken[0]}" if taken else "65535 is the last port"
        raise ConfigError(
            f"router.internal_port is {ports[0]}, so {number} routers take {ports[0]} to {ports[-1]}, and {what}; "
            "choose another, or 0 for any (router.internal_port)"
        )


def _check_pairs(config: Config) -> None:
    """Refuse roles that could not hand over. Here, because nothing must be compiled or loaded before."""
    cluster = config.cluster
    prefill, decode = cluster.ranks_of(Role.PREFILL), cluster.ranks_of(Role.DECODE)
    if cluster.prefill and config.model.deterministic and prefill != decode:
        raise ConfigError(
            f"prefill workers have {prefill} tensor-parallel ranks and decode workers {decode}: their sums differ in "
            "the last bits, and with model.deterministic only equal ones hand over. Give both the same number "
            f"(--tensor-parallel-size {max(prefill, decode)}), or let the bits differ: model.deterministic: false in "
            "--config, or TWOSTROKE__MODEL__DETERMINISTIC=false"
        )


def _check_planner(config: Config) -> None:
    """Refuse a planner whose bounds exclude the configured numbers, or whose workers could not change roles."""
    cluster, planner = config.cluster, config.planner
    if not planner.enabled:
        return
    if not cluster.prefill:
        raise ConfigError(
            "planner.enabled is true and cluster.prefill 0: combined workers have no roles to plan; give "
            "cluster.prefill 1 or more, or leave the planner off"
        )
    if cluster.ranks_of(Role.PREFILL) != cluster.ranks_of(Role.DECODE):
        raise ConfigError(
            f"planner.enabled is true, and prefill workers have {cluster.ranks_of(Role.PREFILL)} tensor-parallel ranks "
            f"and decode workers {cluster.ranks_of(Role.DECODE)}: a worker keeps its ranks when its role changes; give "
            "both the same number, or leave the planner off"
        )
    for role, count in (("prefill", cluster.prefill), ("decode", cluster.decode)):
        least, most = getattr(planner, f"min_{role}_workers"), getattr(planner, f"max_{role}_workers")
        if not least <= count <= most:
            raise ConfigError(
                f"cluster.{role} is {count}; must be within planner.min_{role}_workers ({least}) and "
                f"planner.max_{role}_workers ({most}), as the cluster starts with it"
            )
    if planner.new_nodes and (cluster.launcher != "ray" or cluster.ray_address in (None, "local")):
        raise ConfigError(
            "planner.new_nodes is true, and only a Ray that is joined can be asked for nodes; give cluster.ray_address "
            "(and cluster.launcher ray), or leave it off"
        )
    if planner.new_nodes and planner.max_workers is None:
        raise ConfigError("planner.new_nodes is true, and without planner.max_workers no worker is started; give both")
    total = cluster.prefill + cluster.decode
    if planner.max_workers is not None and not planner.min_workers <= total <= planner.max_workers:
        raise ConfigError(
            f"cluster.prefill and cluster.decode make {total} workers; must be within planner.min_workers "
            f"({planner.min_workers}) and planner.max_workers ({planner.max_workers})"
        )
