"""`twostroke status`: the workers with their roles, load and blocks, as known to the router."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..client.client import Client
from .keys import read_key
from .supervised import without_supervisor

Grpc = Annotated[str, typer.Option("--grpc", help="host:port of the router's gRPC face.")]

ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="TWOSTROKE_API_KEY",
        callback=read_key,
        help="Where the router asks for one: @FILE, or - to type it. A key given as it is can be seen by `ps`.",
        show_envvar=True,
    ),
]

Insecure = Annotated[
    bool, typer.Option("--insecure", help="Speak to another machine in the clear: others may read prompts and the key.")
]

Ca = Annotated[
    str | None, typer.Option("--tls-ca", help="File of the router's authority, or `system`: speak TLS to it.")
]
Cert = Annotated[str | None, typer.Option("--tls-cert", help="File of our certificate, where the router wants one.")]
Key = Annotated[str | None, typer.Option("--tls-key", help="File of its private key.")]


def tls_of(ca: str | None) -> str | bool | None:
    """What `--tls-ca` means to the SDK."""
    return True if ca == "system" else ca


def status(
    grpc: Grpc = "127.0.0.1:8001",
    api_key: ApiKey = None,
    insecure: Insecure = False,
    tls_ca: Ca = None,
    tls_cert: Cert = None,
    tls_key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole document.")] = False,
) -> None:
    """Show the cluster."""
    tls = tls_of(tls_ca)
    with Client(grpc, api_key=api_key, insecure=insecure, tls=tls, cert=tls_cert, key=tls_key, timeout_s=5.0) as client:
        cluster = client.cluster()
    if as_json:
        typer.echo(json.dumps(cluster, indent=2))
        return
    console = Console()
    console.print(_table(cluster))
    for line in models_of(cluster):
        console.print(line, markup=False, highlight=False)
    for line in adapter_memory(cluster):
        console.print(line, markup=False, highlight=False)
    if cluster.get("pairs"):
        console.print(_pairs(cluster))
    if any(worker.get("gpus") for worker in cluster["workers"]):
        console.print(_gpus(cluster))
    for line in guards_of(cluster):
        console.print(line, markup=False, highlight=False)
    for gpu in cluster.get("cordoned_gpus", ()):
        console.print(
            f"cordoned: {gpu['uuid']} ({gpu['name'] or '?'}) of {gpu['worker_id']}, {gpu['since_s']:,.0f} s ago: "
            f"{'; '.join(gpu['reasons'])}",
            markup=False,
            highlight=False,
        )
    drained = [w for w in cluster["workers"] if w["state"] == "draining" and not w.get("changes_codec_to")]
    for name in [worker["worker_id"] for worker in drained]:
        console.print(f"{name} drains; until it has ended, `twostroke undrain {name}` takes it back", markup=False)
    if cluster["router"].get("num_routers", 1) > 1:
        console.print(_routers(cluster))
    for line in router_problems(cluster):
        console.print(line, markup=False)
    if cluster.get("supervisor"):
        console.print(_planner(cluster["supervisor"]), markup=False)
        for each in pending_of(cluster["supervisor"]):
            console.print(f"pending: {each}", markup=False)
    remark = without_supervisor(grpc)
    if remark is not None:
        console.print(remark, markup=False, highlight=False, style="yellow")
    router = cluster["router"]
    console.print(_encryption(cluster), markup=False)
    if router.get("calls_refused"):
        console.print(
            f"{router['calls_refused']:,} calls refused at the workers' port, last of {router['last_refused']}",
            markup=False,
        )


def models_of(cluster: dict[str, Any]) -> list[str]:
    """A line for each model and adapter that clients may ask for, with the live ones of its decode workers."""
    live: Counter[str] = Counter()
    known: Counter[str] = Counter()
    bases: dict[str, str] = {}
    for worker in (worker for worker in cluster["workers"] if worker["role"] != "prefill"):
        adapters = [adapter["name"] for adapter in worker.get("adapters") or ()]
        bases |= dict.fromkeys(adapters, worker["model"])
        known.update([worker["model"], *adapters])
        live.update([worker["model"], *adapters] if worker["state"] == "live" else ())
    return [
        f"model {name}{f', an adapter of {bases[name]}' if name in bases else ''}: "
        f"{live[name]} of its {known[name]} decode workers {'is' if live[name] == 1 else 'are'} live"
        for name in sorted(known, key=lambda name: (name in bases, name))
    ]


def guards_of(cluster: dict[str, Any]) -> list[str]:
    """A line for each worker whose guard has found its cache's codec too coarse, with what follows."""
    lines = []
    for worker in cluster["workers"]:
        name, told = worker["worker_id"], "differs from bfloat16 by more than cache.guard_bound allows"
        if worker.get("changes_codec_to"):
            change = f"{worker['changes_codec_to']} instead of {worker['cache_codec']}"
            lines.append(f"{name} drains and comes back with a cache in {change}: the one it has {told}")
        elif worker.get("fell_back_from"):
            lines.append(
                f"{name} has fallen back to a cache in {worker['cache_codec']}: {worker['fell_back_from']} {told}; a "
                "restart begins with that again, unless --kv-cache-dtype is changed"
            )
        elif worker.get("counters", {}).get("kv_guard_exceeded"):
            lines.append(f"{name}: its KV cache {told}; restart it with another --kv-cache-dtype")
    return lines


def adapter_memory(cluster: dict[str, Any]) -> list[str]:
    """A line for each worker that holds adapters, with their memory beside the weights."""
    lines = []
    for worker in cluster["workers"]:
        sizes = {adapter["digest"]: adapter["size_bytes"] for adapter in worker.get("adapters") or ()}
        if sizes:
            what = "adapter" if len(sizes) == 1 else "adapters"
            taken = sum(sizes.values()) / 2**20
            lines.append(f"{worker['worker_id']} holds {len(sizes)} {what} in {taken:,.1f} MiB beside its weights")
    return lines


def _planner(told: dict[str, Any]) -> str:
    """One line on the planner: workers by role that serve and that it wants, and its last decision."""
    roles = sorted({*told["desired"], *told["actual"]}, reverse=True)
    counts = ", ".join(f"{told['actual'].get(role, 0)} of {told['desired'].get(role, '?')} {role}" for role in roles)
    return f"planner: {counts or 'nothing known yet'}; {told['action']}: {told['reason']} ({told['age_s']:.0f} s ago)"


def pending_of(told: dict[str, Any]) -> list[str]:
    """What the planner has decided and does not see yet, with what hinders it."""
    decision = told.get("decision")
    return [str(each) for each in decision.get("pending", ())] if isinstance(decision, dict) else []


def _encryption(cluster: dict[str, Any]) -> str:
    """One line on what is encrypted between the processes."""
    if not cluster["router"].get("inner_tls"):
        return "links inside: not encrypted (cluster.tls)"
    others = {pair["transport"] for pair in cluster.get("pairs", ())} - {"grpc", "none"}
    plain = f"; not encrypted: {', '.join(sorted(others))}, open to this user of the host alone" if others else ""
    return f"links inside: mutual TLS{plain}"


def _table(cluster: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # fits in 80 columns
    for heading in ("worker", "role", "state", "pid", "runs", "waits", "KV blocks", "metrics"):
        table.add_column(heading, no_wrap=True)  # --json prints the other values
    for worker in cluster["workers"]:
        load, blocks = worker["load"], worker["blocks"]
        table.add_row(
            worker["worker_id"],
            worker["role"],
            worker["state"],
            str(worker["pid"]),
            str(load["running"]),
            str(load["waiting"]),
            f"{blocks['total'] - blocks['free']:,}/{blocks['total']:,}",
            worker.get("metrics_address") or "none",
        )
    return table


def _routers(cluster: dict[str, Any]) -> Table:
    """Routers that share the ports; the first one has answered."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("router", "state", "pid", "requests", "tokens", "live workers"):
        table.add_column(heading, no_wrap=True)
    for router in cluster["routers"]:
        states = router["workers"].values()
        live = f"{sum(state == 'live' for state in states)}/{len(states)}"
        numbers = [f"{router[name]:,}" for name in ("in_flight_requests", "in_flight_tokens")]
        table.add_row(router["name"], router["state"], str(router["pid"]), *numbers, live)
    return table


def router_problems(cluster: dict[str, Any]) -> list[str]:
    """A line for the routers that did not answer, and one for each that could not read its new keys."""
    routers = cluster["routers"]
    num_routers = cluster["router"].get("num_routers", 1)
    silent = num_routers - len(routers)
    lines = [f"{silent} of {num_routers} routers do not answer"] if silent > 0 else []
    lines += [f"{one['name']} keeps its keys: {one['keys_problem']}" for one in routers if one.get("keys_problem")]
    return lines


def _gpus(cluster: dict[str, Any]) -> Table:
    """Health of the watched GPUs."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("worker", "GPU", "health", "MiB used", "W", "°C", "ECC", "why"):
        table.add_column(heading, no_wrap=heading not in ("GPU", "why"))
    for worker in cluster["workers"]:
        for gpu in worker.get("gpus") or ():
            slower = f" ×{gpu['slowdown']:g}" if gpu["slowdown"] else ""
            table.add_row(
                worker["worker_id"],
                f"{gpu['name']} {gpu['uuid'][:12]}".strip(),
                gpu["verdict"] + slower,
                f"{gpu['memory_used_bytes'] >> 20:,}/{gpu['memory_total_bytes'] >> 20:,}",
                f"{gpu['power_watts']:.0f}/{gpu['power_limit_watts']:.0f}",
                str(gpu["temperature_c"]),
                f"{gpu['corrected_errors']:,}+{gpu['uncorrected_errors']:,}",
                escape("; ".join(gpu["reasons"]) or "-"),
            )
    return table


def _pairs(cluster: dict[str, Any]) -> Table:
    """Transport and measured speed of each pair of workers that handed over."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("hand-overs from", "to", "through", "GB/s", "count", "why not shm"):
        table.add_column(heading, no_wrap=heading != "why not shm")
    for pair in cluster["pairs"]:
        speed = pair["bytes_per_s"]
        table.add_row(
            pair["prefill_worker"],
            pair["decode_worker"],
            pair["transport"],
            f"{speed / 1e9:.2f}" if speed else "?",
            f"{pair['handovers']:,}",
            pair["reason"],
        )
    return table
