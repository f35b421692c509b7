"""`twostroke worker`, `router` and `planner`: one process of a cluster, started by the process launcher or in a pod."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..cli import options as o
from ..cluster.config import Config
from ..core.errors import ConfigError
from ..core.process_settings import uncollected
from ..core.request import Role
from ..engine.config import SpeculationConfig

ParentPid = Annotated[int | None, typer.Option(help="End when this process is no longer our parent.", hidden=True)]
MemberOf = Annotated[str | None, typer.Option(help="Name of our deployment, for its supervisors.", hidden=True)]


def worker(
    role: Annotated[Role, typer.Option(help="prefill, decode or combined.")],
    router: Annotated[
        list[str] | None, typer.Option(help="host:port where a router takes announcements; repeatable.")
    ] = None,
    routers_at: Annotated[
        list[str] | None,
        typer.Option(
            help="name:port or k8s://SERVICE.NAMESPACE:PORT; a router at every address of this DNS name, or at every "
            "endpoint of this Service as Kubernetes' API server tells; repeatable."
        ),
    ] = None,
    worker_id: Annotated[str | None, typer.Option(help="Unique name. Default: role and process id.")] = None,
    host: Annotated[
        str, typer.Option(help="Address of the worker's gRPC services. Another than loopback needs --insecure.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of them; 0 = any.")] = 0,
    metrics_port: Annotated[
        str | None,
        typer.Option(help="GET /metrics and /health, on the same address; 0 = any (the default), none = off."),
    ] = None,
    memory_bytes: Annotated[int | None, typer.Option(min=1, help="Memory to use. Default: what is available.")] = None,
    model: o.Model = None,
    served_model_name: o.ServedModelName = None,
    config: o.ConfigFile = None,
    insecure: o.Insecure = None,
    tensor_parallel_size: o.TensorParallelSize = None,
    first_core: Annotated[
        int | None, typer.Option(help="First of the physical cores that its ranks share out.", hidden=True)
    ] = None,
    parent_pid: ParentPid = None,
    member_of: MemberOf = None,
) -> None:
    """Run one worker and announce it to the routers. The cluster's key is TWOSTROKE__CLUSTER__KEY."""
    import os

    from ..checkpoint.locate import located, served_name
    from ..cluster.discovery.sources import source_of
    from ..worker.machine import machine_facts
    from ..worker.settings import WorkerSettings

    with uncollected():
        from ..worker.main import run_worker

    flags: dict[str, Any] = {
        "model": model,
        "served_model_name": served_model_name,
        "config": config,
        "insecure": insecure,
    }
    flags |= {"worker_metrics_port": metrics_port, "tensor_parallel_size": tensor_parallel_size}
    settings = o.config_from(flags)
    check_key(settings)
    if not router and not routers_at:
        raise ConfigError("no router is given to announce to; give --router HOST:PORT or --routers-at NAME:PORT")
    sources = [source_of(name, "--routers-at") for name in routers_at or ()]
    num_ranks = tensor_parallel_size or settings.cluster.ranks_of(role)
    run_worker(
        WorkerSettings(
            worker_id=worker_id or f"{role}-{os.getpid()}",
            role=role,
            model_directory=str(located(settings.model.path)),
            model_name=served_name(settings.model.path, settings.model.name),
            model=settings.model,
            cache=settings.cache,
            step=settings.step,
            speculation=_located_draft(settings.speculation),
            memory_bytes=memory_bytes,
            num_threads=settings.step.num_threads or max(1, machine_facts().num_cores // num_ranks),
            num_ranks=num_ranks,
            first_core=first_core,
            gpu_health=settings.cluster.gpu_health,
            host=host,
            insecure=settings.router.insecure,
            tls=settings.cluster.tls,
            port=port,
            metrics_port=settings.cluster.worker_metrics_port,
            metrics_keys=settings.router.metrics_keys,
            routers=tuple(router or ()),
            cluster_key=settings.cluster.key,
            orphan_grace_s=settings.cluster.orphan_grace_s,
            drain_timeout_s=settings.cluster.drain_timeout_s,
        ),
        parent_pid,
        sources,
    )


def _located_draft(speculation: SpeculationConfig) -> SpeculationConfig:
    """The section with the local directory of the draft model or the heads, if there is one."""
    from ..checkpoint.locate import located

    if speculation.checkpoint is None:
        return speculation
    return speculation.model_copy(update={"model": str(located(speculation.checkpoint, "speculation.model"))})


def router(
    host: o.Host = None,
    port: o.Port = None,
    grpc_port: o.GrpcPort = None,
    insecure: o.Insecure = None,
    ssl_certfile: o.SslCertfile = None,
    ssl_keyfile: o.SslKeyfile = None,
    ssl_ca_certs: o.SslCaCerts = None,
    strict: o.Strict = None,
    allowed_hosts: o.AllowedHosts = None,
    allowed_origins: o.AllowedOrigins = None,
    allowed_methods: o.AllowedMethods = None,
    allowed_headers: o.AllowedHeaders = None,
    allow_credentials: o.AllowCredentials = None,
    config: o.ConfigFile = None,
    parent_pid: ParentPid = None,
    member_of: MemberOf = None,
) -> None:
    """Run one router: both client faces, and the port where workers announce themselves.

    The cluster's key is TWOSTROKE__CLUSTER__KEY, the workers' port TWOSTROKE__ROUTER__INTERNAL_PORT.
    """
    settings = o.config_from(locals())
    from ..cluster.discovery.sources import sources_of_peers

    with uncollected():
        from ..router.process import RouterProcess, run_router

    check_key(settings)
    sources = sources_of_peers(settings.router)
    if settings.router.internal_port == 0:
        raise ConfigError(
            "router.internal_port is 0; workers announce themselves there, so it must be known: set "
            "TWOSTROKE__ROUTER__INTERNAL_PORT, e.g. to 8002"
        )
    reads_defaults = settings.model.generation_config == "auto"
    process = RouterProcess(
        settings.router,
        settings.cluster.key,
        reads_defaults=reads_defaults,
        tls=settings.cluster.tls,
        sources=sources,
    )
    run_router(process, settings.cluster.drain_timeout_s, parent_pid)


def planner(
    namespace: Annotated[str, typer.Option(help="Namespace of what is scaled and of the Lease.")],
    lease: Annotated[str, typer.Option(help="Lease whose holder acts; it is made if it is missing.")],
    prefill_deployment: Annotated[str | None, typer.Option(help="Deployment of the prefill workers.")] = None,
    decode_deployment: Annotated[str | None, typer.Option(help="Deployment of the decode workers.")] = None,
    disaggregated_set: Annotated[
        str | None, typer.Option(help="DisaggregatedSet with the roles prefill and decode, in place of Deployments.")
    ] = None,
    router: Annotated[
        list[str] | None, typer.Option(help="host:port where a router takes announcements; repeatable.")
    ] = None,
    routers_at: Annotated[
        list[str] | None, typer.Option(help="name:port or k8s://SERVICE.NAMESPACE:PORT of routers; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of this process in the Lease. Default: planner-PID.")] = None,
    host: Annotated[str, typer.Option(help="Address of GET /livez.")] = "127.0.0.1",
    health_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of GET /livez (does its loop turn?). Default: none.")
    ] = None,
    config: o.ConfigFile = None,
) -> None:
    """Scale the Deployments or the DisaggregatedSet of workers by the load, and change workers' roles.

    Settings: section `planner`. The cluster's key is TWOSTROKE__CLUSTER__KEY. Workers are called as their pods.
    """
    import logging
    import os

    from ..cluster.discovery.sources import source_of
    from ..cluster.kubernetes.process import Place, run_planner

    settings = o.config_from({"config": config})
    check_key(settings)
    if not router and not routers_at:
        raise ConfigError("no router is given to ask; give --router HOST:PORT or --routers-at NAME:PORT")
    sources = [source_of(each, "--routers-at") for each in routers_at or ()]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    deployments = {Role.PREFILL: prefill_deployment or "", Role.DECODE: decode_deployment or ""}
    is_clear = not any(deployments.values()) if disaggregated_set else all(deployments.values())
    if not is_clear:
        raise ConfigError(
            "what is scaled is not clear; give --disaggregated-set, or --prefill-deployment and --decode-deployment"
        )
    health = None if health_port is None else (host, health_port)
    place = Place(namespace, disaggregated_set or deployments, lease, name or f"planner-{os.getpid()}", health)
    run_planner(settings, place, tuple(router or ()), sources)


def check_operators_key(settings: Config) -> None:
    """Require the key of a cluster that runs, for a command that proves it to the workers."""
    if "key" not in settings.cluster.model_fields_set:
        raise ConfigError(
            "cluster.key is not set, and this command proves to the worker that it has the cluster's: set "
            "TWOSTROKE__CLUSTER__KEY to the secret that the cluster was started with. A cluster that was started "
            "without one has made its own, which nobody else knows: start it again with TWOSTROKE__CLUSTER__KEY set, "
            "to 16 characters or more"
        )


def check_key(settings: Config) -> None:
    """Require a configured cluster key: with different keys, processes would treat each other's blocks as damaged."""
    if "key" not in settings.cluster.model_fields_set:
        raise ConfigError(
            "cluster.key is not set; all processes of a cluster share one: set TWOSTROKE__CLUSTER__KEY to the same "
            "secret of 16 characters or more for each of them"
        )
