"""Conversions to protobuf messages and back: sampling, specs, errors, epochs, timelines. Knows no stream, no state.

Messages come from a peer: `..._from_wire` functions check values that a worker could not run with, and raise typed
errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, Literal

from ..core.errors import InvalidRequest, TwostrokeError, from_code
from ..core.request import CacheScope, Epoch, FinishReason, Grammar, Role, SamplingParams, TokenLogprobs
from ..core.sampling import FIELDS, Form
from ..core.timeline import Timeline
from ..protos import common_pb2, handover_pb2, worker_pb2
from .codec import Codec
from .spec import Component, KvSpec, LayerGroup

_FINISH_TO_WIRE: dict[FinishReason, common_pb2.FinishReason.ValueType] = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_FINISH_FROM_WIRE = {number: reason for reason, number in _FINISH_TO_WIRE.items()}
_ROLE_TO_WIRE: dict[Role, common_pb2.Role.ValueType] = {
    Role.PREFILL: common_pb2.ROLE_PREFILL,
    Role.DECODE: common_pb2.ROLE_DECODE,
    Role.COMBINED: common_pb2.ROLE_COMBINED,
}
_ROLE_FROM_WIRE = {number: role for role, number in _ROLE_TO_WIRE.items()}


# ------------------------------------------------------------------ sampling


def _words_to_wire(words: Iterable[tuple[int, ...]]) -> list[common_pb2.TokenIds]:
    return [common_pb2.TokenIds(ids=word) for word in words]


def _words_from_wire(words: Iterable[common_pb2.TokenIds]) -> tuple[tuple[int, ...], ...]:
    found = tuple(tuple(word.ids) for word in words)
    if not all(found):
        raise InvalidRequest("bad_word_ids holds a word without tokens", param="bad_words")
    return found


def _biases_from_wire(biases: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(biases.items()))


def _grammar_to_wire(grammar: Grammar | None) -> common_pb2.StructuredOutputs | None:
    return None if grammar is None else common_pb2.StructuredOutputs(**{grammar.kind: grammar.source})


def grammar_from_wire(message: common_pb2.StructuredOutputs) -> Grammar | None:
    """The rule in a message; None: it holds none."""
    kind = message.WhichOneof("rule")
    return None if kind is None else Grammar(kind, getattr(message, kind))


_TO_WIRE: Mapping[Form, Callable[[Any], Any]] = {
    Form.BIASES: dict,
    Form.WORDS: _words_to_wire,
    Form.GRAMMAR: _grammar_to_wire,
}
_FROM_WIRE: Mapping[Form, Callable[[Any], Any]] = {
    Form.TEXTS: tuple,
    Form.TOKEN_IDS: tuple,
    Form.WORDS: _words_from_wire,
    Form.BIASES: _biases_from_wire,
    Form.GRAMMAR: grammar_from_wire,
}
_ON_WIRE = common_pb2.SamplingParams.DESCRIPTOR.fields_by_name

# The table of fields, sorted by what is done with them: computed once, because every order goes through here.
_NAMES = tuple(field.name for field in FIELDS)
_WIRE_NAMES = tuple(field.wire for field in FIELDS)
_values_of_params = attrgetter(*_NAMES)
_values_of_message = attrgetter(*_WIRE_NAMES)
_WRITTEN = tuple((field.wire, _TO_WIRE[field.form]) for field in FIELDS if field.form in _TO_WIRE)
_READ = tuple((field.name, _FROM_WIRE[field.form]) for field in FIELDS if field.form in _FROM_WIRE)
_REQUIRED = tuple(field.wire for field in FIELDS if field.is_required)
_ABSENT = tuple(  # (name, name on the wire, value) where protobuf's value of an absent field is another than ours
    (field.name, field.wire, field.neutral)
    for field, on_wire in ((field, _ON_WIRE[field.wire]) for field in FIELDS if not field.is_required)
    if on_wire.has_presence and on_wire.message_type is None and on_wire.default_value != field.neutral
)
_COMPUTABLE = tuple((field.name, *field.computable) for field in FIELDS if field.computable)
_ADDENDS = tuple(field.name for field in FIELDS if field.form is Form.NUMBER and not field.computable)
_BIASES = tuple(field.name for field in FIELDS if field.form is Form.BIASES)


def sampling_to_wire(params: SamplingParams) -> common_pb2.SamplingParams:
    """Sampling parameters as a message. It sets every field, so that a worker needs no defaults."""
    values: dict[str, Any] = dict(zip(_WIRE_NAMES, _values_of_params(params), strict=True))
    for name, to_wire in _WRITTEN:
        values[name] = to_wire(values[name])
    return common_pb2.SamplingParams(**values)


def sampling_from_wire(message: common_pb2.SamplingParams) -> SamplingParams:
    """Sampling parameters of a router's message. The router has validated them; only values that would break a
    worker are refused here.

    Raises:
        InvalidRequest: `max_tokens` or `seed` is absent, a number has no meaning (NaN, negative temperature), or a
            bad word has no token.
    """
    has: Callable[[Any], bool] = message.HasField
    if not all(map(has, _REQUIRED)):
        raise InvalidRequest(f"{' and '.join(_REQUIRED)} must be set on an order to a worker", param="sampling")
    values: dict[str, Any] = dict(zip(_NAMES, _values_of_message(message), strict=True))
    for name, wire, neutral in _ABSENT:
        if not has(wire):
            values[name] = neutral
    for name, low, high, remedy in _COMPUTABLE:
        if not low <= values[name] <= high:
            raise InvalidRequest(f"{name} is {values[name]}; must be {remedy}", param=name)
    for name, from_wire in _READ:
        values[name] = from_wire(values[name])
    addends = [values[name] for name in _ADDENDS]
    addends += [bias for name in _BIASES for _, bias in values[name]]
    if not all(map(math.isfinite, addends)):
        raise InvalidRequest("a penalty or a bias is not finite", param="sampling")
    return SamplingParams(**values)


def logprobs_to_wire(logprobs: Iterable[TokenLogprobs]) -> list[common_pb2.TokenLogprobs]:
    """Log-probabilities as messages, one per token."""
    return [
        common_pb2.TokenLogprobs(
            token_id=one.token_id,
            logprob=one.logprob,
            rank=one.rank,
            top_ids=[token_id for token_id, _ in one.top],
            top_logprobs=[logprob for _, logprob in one.top],
        )
        for one in logprobs
    ]


def logprobs_from_wire(messages: Iterable[common_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities from messages; a surplus of alternative ids or of their values is dropped."""
    return tuple(
        TokenLogprobs(m.token_id, m.logprob, m.rank, tuple(zip(m.top_ids, m.top_logprobs, strict=False)))
        for m in messages
    )


# ------------------------------------------------------------------ specs


def spec_to_wire(spec: KvSpec) -> common_pb2.KvSpec:
    """Cache layout as a message."""
    message = common_pb2.KvSpec()
    for group in spec.groups:
        out = message.groups.add(name=group.name, num_layers=group.num_layers)
        for c in group.components:
            replicated = c.shard == "replicate"
            out.components.add(name=c.name, heads=c.heads, width=c.width, codec=c.codec, replicated=replicated)
    return message


def spec_from_wire(message: common_pb2.KvSpec) -> KvSpec:
    """Cache layout of a peer.

    Raises:
        InvalidRequest: no group, or a codec that this release does not know.
    """
    if not message.groups:
        raise InvalidRequest("the peer's kv_spec has no layer group", param="kv_spec")
    return KvSpec(tuple(_group_from(group) for group in message.groups))


def _group_from(group: common_pb2.LayerGroup) -> LayerGroup:
    components = []
    for c in group.components:
        if c.codec not in Codec._value2member_map_:
            known = ", ".join(f"{codec.value} ({codec.name.lower()})" for codec in Codec)
            raise InvalidRequest(f"component {c.name!r} has codec {c.codec}; known are {known}", param="kv_spec")
        shard: Literal["split", "replicate"] = "replicate" if c.replicated else "split"
        components.append(Component(c.name, c.heads, c.width, c.codec, shard))
    return LayerGroup(group.name, group.num_layers, tuple(components))


# ------------------------------------------------------------------ small values


def finish_to_wire(reason: FinishReason) -> common_pb2.FinishReason.ValueType:
    """Finish reason as its protobuf enum value."""
    return _FINISH_TO_WIRE[reason]


def finish_from_wire(number: common_pb2.FinishReason.ValueType) -> FinishReason | None:
    """Finish reason of an enum value; None: still running, or a reason of a newer release."""
    return _FINISH_FROM_WIRE.get(number)


def role_to_wire(role: Role) -> common_pb2.Role.ValueType:
    """Role as its protobuf enum value."""
    return _ROLE_TO_WIRE[role]


def role_from_wire(number: common_pb2.Role.ValueType) -> Role:
    """Role of an enum value.

    Raises:
        InvalidRequest: the value is unknown to this release.
    """
    try:
        return _ROLE_FROM_WIRE[number]
    except KeyError:
        raise InvalidRequest(f"worker role {number} is unknown to this release", param="role") from None


def epoch_to_wire(epoch: Epoch) -> worker_pb2.Epoch:
    """Epoch (router incarnation, counter) as a message."""
    return worker_pb2.Epoch(incarnation=epoch.incarnation, counter=epoch.counter)


def epoch_from_wire(message: worker_pb2.Epoch) -> Epoch:
    """Epoch (router incarnation, counter) of a message."""
    return Epoch(message.incarnation, message.counter)


def scope_to_wire(scope: CacheScope) -> dict[str, Any]:
    """Constructor arguments of a message that carries a cache scope: `Submit`, `Open` and `FetchRequest` alike."""
    return {"isolation_domain": scope.isolation_domain, "adapter": scope.adapter}


def scope_from_wire(
    message: worker_pb2.Submit | handover_pb2.Open | handover_pb2.FetchRequest | handover_pb2.KeepRequest,
) -> CacheScope:
    """The cache scope that a message carries."""
    return CacheScope(message.isolation_domain, message.adapter)


def error_to_wire(error: TwostrokeError) -> common_pb2.Error:
    """Typed error as a message; `retry_after_s` becomes whole milliseconds."""
    retry_after_ms = 0 if error.retry_after_s is None else max(1, round(error.retry_after_s * 1000))
    return common_pb2.Error(
        code=error.code, message=error.message, param=error.param or "", retry_after_ms=retry_after_ms
    )


def error_from_wire(message: common_pb2.Error) -> TwostrokeError:
    """Typed error of a message; an unknown code becomes an InternalError."""
    retry_after_s = message.retry_after_ms / 1000 if message.retry_after_ms else None
    return from_code(message.code, message.message, param=message.param or None, retry_after_s=retry_after_s)


def instants_to_wire(timeline: Timeline, origin_s: float) -> list[common_pb2.Instant]:
    """Named instants as messages, in nanoseconds since `origin_s`."""
    return [common_pb2.Instant(name=n, since_seen_ns=ns) for n, ns in timeline.since_ns(origin_s).items()]


def adopt_instants(timeline: Timeline, instants: Iterable[common_pb2.Instant], origin_s: float) -> None:
    """Add a peer's instants to `timeline`, counted from our own `origin_s`."""
    timeline.adopt([(instant.name, instant.since_seen_ns) for instant in instants], origin_s)
