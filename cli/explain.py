"""`twostroke explain`: why a request went where it went, and what happened when, as the router knows it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..client.client import Client
from ..core.timeline import Instant
from .status import ApiKey, Ca, Cert, Grpc, Insecure, Key, tls_of


class Term(NamedTuple):
    """A term of a candidate's cost."""

    heading: str
    meaning: str


TERMS = {
    "prefill_queue_ms": Term("queue P", "until the prefill worker begins with this prompt"),
    "prefill_ms": Term("prefill", "computing the prompt's tokens that are not held"),
    "transfer_ms": Term("move KV", "moving the prompt's KV cache to the decode worker"),
    "decode_queue_ms": Term("queue D", "until the decode worker has a place for this request"),
    "load_penalty_ms": Term("load", "what this request costs the others there, weighted"),
    "throttle_ms": Term("slow", "what a throttled GPU adds"),
    "fetch_ms": Term("fetch", "fetching cached KV from the worker before >>"),
    "total_ms": Term("total", "the sum; the least one is chosen (>)"),
}
HELD = Term("held", "tokens of the prompt whose KV the worker has in its cache")
INSTANTS = {
    Instant.ARRIVED: "the router has read the request",
    Instant.ADMITTED: "it is valid, tokenised and within its quotas",
    Instant.ROUTED: "workers are chosen and the order is sent",
    Instant.RECEIVED: "the decode worker has the order",
    Instant.PROMISED: "it has promised room for the KV cache",
    Instant.OFFERED: "the prefill worker has queued the prompt",
    Instant.STARTED: "the prompt is next to be computed",
    Instant.BOUND: "the decode worker has set memory aside for it",
    Instant.PREFILL_BEGAN: "its first part is being computed",
    Instant.PREFILLED: "all of it is computed",
    Instant.FIRST_FRAME: "the first KV has reached the decode worker, intact",
    Instant.FIRST_TOKEN: "the first token is there",
    Instant.LAST_FRAME: "all KV of the prompt has reached the decode worker",
    Instant.SECOND_TOKEN: "the second token is there",
    Instant.LAST_TOKEN: "the last token is there",
    Instant.FIRST_SENT: "the router has sent the client its first piece",
    Instant.FINISHED: "the request is over",
}
LEFT = Term("left", "the router gave this worker up")
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
    with_legend: Annotated[bool, typer.Option("--legend/--no-legend", help="Say what the words mean.")] = True,
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
    if with_legend:
        console.print()
        for line in legend(told):
            console.print(line, style="dim", markup=False, highlight=False)


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
    terms = _shown_terms(choice)
    caption = f"and {left_out} more: --json" if left_out else None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("candidate (ms)", overflow="fold")
    table.add_column("held", justify="right", no_wrap=True)
    for term in terms.values():
        table.add_column(term.heading, justify="right", no_wrap=True)
    for one in shown:
        mark = "> " if one == choice["winner"] else "  "
        sources = one.get("fetched_from") or []
        pair = [one["prefill_worker"], one["decode_worker"]] if one["prefill_worker"] else [one["decode_worker"]]
        name = f"{sources[0]} >> {pair[-1]}" if sources else " + ".join(pair)
        if returns := one.get("prefill_fetched_from"):
            name = f"{returns[0]} >> {name}"
        numbers = [_number(one.get(name) or 0.0) for name in terms]
        table.add_row(Text(mark + name), f"{one['prefill_held_tokens']:,}", *numbers)
    return table


def _shown_terms(choice: Mapping[str, Any]) -> dict[str, Term]:
    """Terms that some candidate has."""
    always = ("prefill_ms", "total_ms")
    return {
        name: term
        for name, term in TERMS.items()
        if name in always or any(one.get(name) for one in choice["candidates"])
    }


def legend(told: Mapping[str, Any]) -> Iterator[str]:
    """The meaning of each word that the candidates and the timeline of this request use, in the order of its life."""
    dispatches = told.get("dispatches") or []
    terms = [HELD, *_shown_terms(told["choice"]).values()] if told.get("choice") else []
    marked = {name for each in (told, *dispatches) for name in each["timeline"]}
    instants = [Term(name, meaning) for name, meaning in INSTANTS.items() if name in marked]
    instants += [LEFT] if any(one.get("left") for one in dispatches) else []
    width = max(len(term.heading) for term in (*terms, *instants))
    if terms:
        yield "candidates, in predicted milliseconds:"
        yield from (f"  {term.heading:<{width}}  {term.meaning}" for term in terms)
    yield "timeline, in milliseconds from one instant to the next:"
    yield from (f"  {term.heading:<{width}}  {term.meaning}" for term in instants)


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
