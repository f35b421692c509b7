"""Settings of one worker process. Plain data: it is sent to child processes and Ray actors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ..checkpoint.config import ModelConfig
from ..core.config import Section, as_word
from ..core.lease import ORPHAN_GRACE_S
from ..core.request import Role
from ..core.tls.config import TlsConfig
from ..engine.config import SpeculationConfig, StepConfig
from ..kv.config import CacheConfig

GpuHealth = Annotated[Literal["auto", "on", "off"], BeforeValidator(as_word)]
"""Whether a worker watches its GPU through NVML. auto: if it computes on one; on: also beside a model on the CPU."""


class WorkerSettings(Section):
    """Settings of one worker of the plan."""

    worker_id: str
    role: Role
    model_directory: str  # resolved: a local directory
    model_name: str  # as clients name it
    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    step: StepConfig = StepConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    memory_bytes: int | None = None  # share of the machine or device; None: all that is available now
    num_threads: int = 1  # of each rank
    num_ranks: int = Field(1, ge=1, le=64)  # tensor-parallel: processes that split the model's layers
    first_core: int | None = None  # the ranks' cores begin here, in the order of `machine.cores`; None: any cores
    gpu: int = 0  # index among the GPUs that the process sees
    gpu_health: GpuHealth = "auto"
    host: str = "127.0.0.1"
    insecure: bool = False  # True: `host` may be an address that other machines can reach
    tls: TlsConfig | None = None  # certificates of the gRPC links; with them `host` may be such an address, too
    port: int = 0  # 0: any
    metrics_port: int | None = 0  # GET /metrics and /health, on the same host; 0: any, None: off
    metrics_keys: tuple[str, ...] = Field((), repr=False)  # GET /metrics needs one of them; empty: no key
    routers: tuple[str, ...] = ()  # host:port of their Announce services
    cluster_key: str = Field(min_length=16, repr=False)
    orphan_grace_s: float = ORPHAN_GRACE_S
    drain_timeout_s: float = 10.0
