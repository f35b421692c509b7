"""`twostroke explain`: why a request went where it went, and what happened when, as the router knows it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..client.client import Client
from .status import ApiKey, Ca, Cert, Grpc, Insecure, Key, tls_of

TERMS = {
    "prefill_queue_ms": "queue P",
    "prefill_ms": "prefill",
    "transfer_ms": "move KV",
    "decode_queue_ms": "queue D",
    "load_penalty_ms": "load",
    "throttle_ms": "slow",
    "fetch_ms": "fetch",
    "total_ms": "total",
}
MAX_CANDIDATES = 12  # lines of the table; --json has all
LABEL, BAR = 30, 36  # columns of the timeline


def explain(
    request_id: Annotated[str, typer.Argument(help="Id of the request, as its answer has it.")],
    grpc: Grpc = "127.0.0.1:8001",
    api_key: ApiKey = None,
    insecure: Insecure = False,
    tls_ca: Ca = None,
    tls_cert: Cert = None,
    tls_key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole document.")] = False,
) -> None:
    """Show the candidates of a request's routing with the terms of their cost, and the timeline of all its attempts."""
    tls = tls_of(tls_ca)
    with Client(grpc, api_key=api_key, insecure=insecure, tls=tls, cert=tls_cert, key=tls_key, timeout_s=5.0) as client:
        told = client.explain(request_id)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    console = Console()
    for line in summary(told):
        console.print(line, markup=False, highlight=False)
    if told.get("choice"):
        console.print()
        console.print(candidates(told["choice"]))
    for part in attempts(told):
        console.print()
        console.print(part, no_wrap=True, crop=True)


def summary(told: Mapping[str, Any]) -> Iterator[str]:
    """What was asked and given, and the reason of the last choice."""
    tokens, itl = told["tokens"], told.get("itl_ms")
    first = f", first token after {told['ttft_ms']:,.1f} ms" if told.get("ttft_ms") is not None else ""
    pace = f", then one every {itl['mean']:,.1f} ms" if itl else ""
    ends = ", ".join(reason or "not ended" for reason in told["finish_reasons"])
    yield f"{told['request_id']} ({told['model']}): {told['state']}, {ends}{first}{pace}"
    yield f"{tokens['prompt']:,} prompt tokens, {tokens['cached']:,} of them cached, {tokens['completion']:,} generated"
    if told.get("error"):
        yield f"error: {told['error']['code']}: {told['error']['message']}"
    if told.get("choice"):
        yield f"choice: {told['choice']['reason']}"


def candidates(choice: Mapping[str, Any]) -> Table:
    """All candidates of a choice, the winner marked, with predicted milliseconds by term. Fits in 80 columns."""
    shown = choice["candidates"][:MAX_CANDIDATES]
    left_out = len(choice["candidates"]) - len(shown)
    terms = {
        name: heading
        for name, heading in TERMS.items()
        if name in ("prefill_ms", "total_ms") or any(one.get(name) for one in choice["candidates"])
    }
    caption = f"and {left_out} more: --json" if left_out else None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("candidate (ms)", overflow="fold")
    table.add_column("held", justify="right", no_wrap=True)
    for heading in terms.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for one in shown:
        mark = "> " if one == choice["winner"] else "  "
        sources = one.get("fetched_from") or []
        pair = [one["prefill_worker"], one["decode_worker"]] if one["prefill_worker"] else [one["decode_worker"]]
        name = f"{sources[0]} >> {pair[-1]}" if sources else " + ".join(pair)
        numbers = [_number(one.get(name) or 0.0) for name in terms]
        table.add_row(Text(mark + name), f"{one['prefill_held_tokens']:,}", *numbers)
    return table


def attempts(told: Mapping[str, Any]) -> Iterator[Text]:
    """The timeline of each attempt as bars on one scale, from the request's arrival to its last instant."""
    dispatches = told.get("dispatches") or []
    instants = [told["timeline"], *(one["timeline"] for one in dispatches)]
    ends = [at_ms for each in instants for at_ms in each.values()]
    ends += [one["left"]["at_ms"] for one in dispatches if one.get("left")]
    end_ms = max(ends, default=0.0)
    before = [at_ms for name, at_ms in told["timeline"].items() if name in ("arrived", "admitted", "routed")]
    yield _lines("in the router", _named(told["timeline"], before[-1:] or [0.0]), end_ms)
    for number, one in enumerate(dispatches, 1):
        peers = one["prefill_peers"]
        where = f"{peers[0]} + {one['decode_worker']}" if peers else one["decode_worker"]
        resumed = sum(one["resumed_tokens"])
        title = f"attempt {number}: {where}" + (f", after {resumed:,} tokens" if resumed else "")
        for source, tokens in (one.get("fetched") or {}).items():
            title += f", {tokens:,} tokens fetched from {source}"
        # A finished attempt has the request's own instants; one that was left has those that its worker told.
        marks = dict(one["timeline"]) if one.get("left") or len(dispatches) > 1 else dict(told["timeline"])
        marks = {name: at_ms for name, at_ms in marks.items() if at_ms >= one["at_ms"]}
        marks.setdefault("routed", one["at_ms"])
        if one.get("first_token_ms") is not None:
            marks.setdefault("first_token", one["first_token_ms"])
        if one.get("left"):
            title += f"; left: {one['left']['code']}"
            marks["left"] = one["left"]["at_ms"]
        elif "finished" in told["timeline"]:
            marks.setdefault("finished", told["timeline"]["finished"])
        yield _lines(title, marks, end_ms)


def _named(timeline: Mapping[str, float], until: list[float]) -> dict[str, float]:
    return {name: at_ms for name, at_ms in timeline.items() if at_ms <= until[0]}


def _lines(title: str, marks: Mapping[str, float], end_ms: float) -> Text:
    """One line per span between two instants."""
    ordered = sorted(marks.items(), key=lambda pair: (pair[1], pair[0] != "routed"))
    lines = [title]
    for (name, start_ms), (following, stop_ms) in itertools.pairwise(ordered):
        label = f"{name} > {following}"
        lines.append(f"  {label:<{LABEL}.{LABEL}} {_bar(start_ms, stop_ms, end_ms)} {stop_ms - start_ms:>8,.1f}")
    return Text("\n".join(lines))


def _bar(start_ms: float, stop_ms: float, end_ms: float) -> str:
    """A bar of at least one column at its place on the scale."""
    scale = BAR / end_ms if end_ms > 0 else 0.0
    first = min(BAR - 1, int(start_ms * scale))
    last = max(first + 1, min(BAR, round(stop_ms * scale)))
    return "·" * first + "█" * (last - first) + "·" * (BAR - last)


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
