"""`--dry-run` of `serve` and `up`: the plan of a start, here or on a machine that is not here, as tables."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..cli import options as o
from ..cluster.catalogue import MachineShape, parse_machine
from ..cluster.config import Config
from ..cluster.fit import RankFit, fits, kinds_that_hold, nodes_of
from ..cluster.model_facts import model_facts, needs_by_ranks
from ..cluster.nodes import Node
from ..cluster.placement import ModelFacts, Plan, ProcessPlan, bytes_beside_workers
from ..cluster.prepare import check_files, found_nodes, plan_on
from ..core.errors import ConfigError
from ..core.hosts import is_loopback_name
from ..core.ports import numeric_host
from ..router.config import GOOD_KEY_CHARS

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Machine = Annotated[
    str | None,
    typer.Option(help="With --dry-run: plan for GPUs that are not here, e.g. 8xH100, or 2x4xA100-80GB on 2 nodes."),
]

_FIT_HEADINGS = (
    "GPUs",
    "weights each",
    "activations each",
    "KV pool each",
    "tokens of KV",
    "context",
    "weights read in",
)


def shows_plan(settings: Config, *, dry_run: bool, machine: str | None) -> bool:
    """Print the plan that a start would make, if a user asks for it; False: nobody asked.

    Raises:
        ConfigError: `machine` without `dry_run`, or no such machine or no start on it.
        CheckpointError, DoesNotFit: as a start.
    """
    if machine is not None and not dry_run:
        raise ConfigError(f"--machine is {machine!r}, which is only for plans: give --dry-run with it, or leave it out")
    if not dry_run:
        return False
    out = Console()
    if machine is None:
        check_files(settings)
        nodes = asyncio.run(found_nodes(settings, lambda line: typer.echo(line, err=True)))
        show_plan(settings, plan_on(settings, nodes), out, nodes)
        return True
    shape = parse_machine(machine)
    spanning, nodes = _spanning(settings, shape), nodes_of(shape)
    show_fits(spanning, shape, out)
    show_plan(spanning, plan_on(spanning, nodes), out, nodes, is_here=False)
    if spanning != settings:
        out.print(f"note: to start on {shape.num_nodes} nodes, give the address of a Ray on all of them: --ray-address")
    return True


def _spanning(config: Config, shape: MachineShape) -> Config:
    """The configuration of a start on so many nodes: a Ray of our own has one.

    Raises:
        ConfigError: the model is for the CPU, or the launcher uses one node.
    """
    if config.model.device == "cpu":
        raise ConfigError("model.device is 'cpu', and --machine names GPUs: leave one of them out")
    cluster = config.cluster
    if shape.num_nodes == 1 or (cluster.launcher == "ray" and cluster.ray_address not in (None, "local")):
        return config
    if cluster.launcher != "ray":
        raise ConfigError(
            f"--machine names {shape.num_nodes} nodes, and the launcher {cluster.launcher} starts workers on one: "
            "plan for one node, or give --launcher ray"
        )
    return config.model_copy(update={"cluster": cluster.model_copy(update={"ray_address": "auto"})})


# ------------------------------------------------------------------ what fits


def show_fits(config: Config, shape: MachineShape, out: Console) -> None:
    """Print the machine, one worker's needs by its number of GPUs, and which GPUs hold it.

    Raises:
        CheckpointError, ConfigError: as `model_facts`.
    """
    out.print(str(shape), highlight=False)
    needs = needs_by_ranks(config, shape.gpus_per_node)
    found = fits(needs, config, shape.gpu)
    table = Table(title="one worker, by its GPUs", title_justify="left")
    for heading in _FIT_HEADINGS:
        table.add_column(heading, justify="right")
    table.add_column("served")
    for fit in found:
        step = [mib(fit.activation_bytes), mib(fit.pool_bytes), f"{fit.num_tokens:,}", f"{fit.max_model_len:,}"]
        shown = step if fit.is_possible else ["", "does not fit", "", ""]
        served = "yes" if fit.is_served else "no" if fit.num_ranks == 1 else "no: one GPU per worker"
        table.add_row(str(fit.num_ranks), mib(fit.weight_bytes), *shown, f"{fit.read_ms(shape.gpu):.2f} ms", served)
    out.print(table)
    if config.model.adapter_bytes:
        out.print(f"adapters {mib(config.model.adapter_bytes)} per worker beside the weights (model.max_lora_bytes)")
    if found[0].is_possible:
        out.print("note: a worker fits 1 GPU of this kind, and this release runs workers of one GPU")
        return
    facts = model_facts(config, shape.num_gpus)  # a plan, which would show its remarks, cannot be made
    for remark in facts.remarks:
        out.print(f"note: {remark}", highlight=False)
    held = kinds_that_hold(needs[1], config)
    which = f"One GPU of these holds it: {', '.join(held)}" if held else "No GPU of the catalogue holds it"
    out.print(
        f"note: {_least_ranks(found)}, and this release runs workers of one GPU (no tensor parallelism on GPUs): "
        f"{facts.name} cannot be served on this machine with these settings. {which}",
        highlight=False,
    )


def mib(num_bytes: int) -> str:
    """Bytes in MiB, as text."""
    return f"{num_bytes / 2**20:,.0f} MiB"


def _least_ranks(found: Sequence[RankFit]) -> str:
    least = next((fit.num_ranks for fit in found if fit.is_possible), None)
    if least is None:
        return f"a worker does not fit {found[-1].num_ranks} GPUs, the most of a node that its heads can be split over"
    return f"a worker would need {least} GPUs of this kind"


# ------------------------------------------------------------------ the plan


def show_plan(config: Config, plan: Plan, out: Console, nodes: Sequence[Node], *, is_here: bool = True) -> None:
    """Print workers, threads, memory and ports. `nodes`: those of the plan; `is_here`: they exist and were asked."""
    table = Table(title=f"{plan.model.name} — launcher {config.cluster.launcher}", title_justify="left")
    for heading in ("member", "role", "ranks", "threads each", "memory at most", "KV pool"):
        table.add_column(heading)
    for member in plan.members:
        if member.kind == "router":
            table.add_row(member.name, "router", "", "", _node_of(member, nodes), "")
        else:
            pool = f"{plan.pool.num_blocks:,} × {plan.pool.block_tokens} = {plan.pool.num_tokens:,} tokens"
            device = f"GPU {member.gpu}" if member.device == "cuda" else ""
            where = " ".join(word for word in (_node_of(member, nodes), device) if word)
            memory = f"{f'{where}: ' if where else ''}{mib(member.memory_bytes)}"
            ranks, threads = str(member.num_ranks), str(member.num_threads)
            table.add_row(member.name, str(member.role), ranks, threads, memory, pool)
    out.print(table)
    spare = _num_spare_gpus(plan, nodes)
    if spare:
        out.print(
            f"{spare} {'GPU has' if spare == 1 else 'GPUs have'} no worker; --prefill and --decode ask for more workers"
        )
    taken = (plan.model.weight_bytes + plan.model.adapter_bytes + plan.pool.pool_bytes) / 2**20
    adapters = ", adapters" if plan.model.adapter_bytes else ""
    share = "its share of what is free now" if is_here else "its share of a GPU that nobody else uses"
    out.print(
        f"each worker takes {taken:,.0f} MiB for weights{adapters} and KV pool, as requests fill it; at most: {share}"
    )
    out.print(f"computes in {plan.model.arithmetic}")
    out.print(f"pool of each worker: {plan.pool.arithmetic}")
    if plan.free_places:
        out.print(
            f"places for {len(plan.free_places)} further workers, which the planner may start (planner.max_workers): "
            "each has its share of the memory already"
        )
    _show_beside(config, out)
    if plan.pool.num_swap_blocks:
        swap_tokens = plan.pool.num_swap_blocks * plan.pool.block_tokens
        out.print(
            f"swap space of each worker: {config.cache.swap_space:g} GiB = {plan.pool.num_swap_blocks:,} blocks "
            f"= {swap_tokens:,} tokens of preempted sequences"
        )
    _show_model(config, plan.model, out)
    out.print(
        f"ports: HTTP {config.router.host}:{config.router.port} · gRPC {config.router.grpc_port} · "
        f"workers: any · their metrics: {_metrics_ports(plan)}"
    )
    reasons = Table(title="settings that this machine decides, unless given", title_justify="left")
    for heading in ("setting", "value", "why"):
        reasons.add_column(heading)
    flags = {setting: f"--{flag.replace('_', '-')}" for flag, setting in o.SETTING_BY_FLAG.items()}
    for decision in plan.decisions:
        name = f"{decision.setting} ({flags[decision.setting]})" if decision.setting in flags else decision.setting
        reasons.add_row(name, decision.value, decision.reason)
    out.print(reasons)


def _show_beside(config: Config, out: Console) -> None:
    """Memory of the other processes on the machine where the command runs."""
    beside, cluster = bytes_beside_workers(config) / 2**20, config.cluster
    joined = cluster.ray_address if cluster.ray_address != "local" else None
    what = "the router and the launcher"
    if cluster.launcher == "ray":
        what = f"{what}, without the Ray that is joined" if joined else f"{what} and a Ray that is started for them"
    out.print(f"beside the workers: {beside:,.0f} MiB for {what}")


def _show_model(config: Config, model: ModelFacts, out: Console) -> None:
    out.print(
        f"weights {model.weight_bytes / 2**20:,.1f} MiB per worker · context {model.max_model_len:,} · "
        f"KV {model.kv_spec.bytes_per_token:,} bytes/token"
        + (f" · recurrent state {model.state_bytes:,} bytes/sequence" if model.state_bytes else "")
    )
    if model.adapter_bytes:
        out.print(
            f"adapters {model.adapter_bytes / 2**20:,.1f} MiB per worker, kept for them beside the weights "
            f"(model.max_lora_bytes): at most {config.model.max_loras} at once"
        )
    if config.speculation.method is not None:
        most = config.speculation.num_speculative_tokens
        out.print(f"speculation: {config.speculation.method}, at most {most} guessed tokens per sequence and step")
    if model.draft:
        out.print(f"part of the above: {model.draft}")
    out.print(f"where a request says nothing: {model.sampling or 'temperature 1.0, no filters'}")
    for remark in [*(f"note: {remark}" for remark in model.remarks), *settings_remarks(config)]:
        out.print(remark)


def _node_of(member: ProcessPlan, nodes: Sequence[Node]) -> str:
    """Address of a member's machine; empty where there is one only."""
    return next((node.address for node in nodes if node.name == member.node), "") if len(nodes) > 1 else ""


def _num_spare_gpus(plan: Plan, nodes: Sequence[Node]) -> int:
    used = {(member.node, member.gpu) for member in plan.workers if member.device == "cuda"}
    return sum(len(node.machine.gpu_bytes) for node in nodes) - len(used) if used else 0


def _metrics_ports(plan: Plan) -> str:
    ports = [worker.metrics_port for worker in plan.workers]
    if ports[0] is None:
        return "none"
    return f"{ports[0]} to {ports[-1]}" if ports[0] else "any"


def settings_remarks(config: Config) -> list[str]:
    """Notes on settings that are accepted but could be better."""
    remarks = []
    weak = config.router.num_weak_keys
    if weak:
        have = "has" if weak == 1 else "have"
        remarks.append(f"note: {weak} of router.api_keys {have} fewer than {GOOD_KEY_CHARS} characters")
    if not is_loopback_name(numeric_host(config.router.host)) and not config.router.has_keys:
        remarks.append(
            f"note: whoever reaches {config.router.host} may use this, for there are no router.api_keys "
            "(TWOSTROKE__ROUTER__API_KEYS)"
        )
    if "key" not in config.cluster.model_fields_set:
        remarks.append(
            "note: no cluster.key is given, so the cluster makes one that no command knows: `twostroke role`, "
            "and `drain` from another machine, need a start with TWOSTROKE__CLUSTER__KEY set"
        )
    return remarks
