"""Conversions to protobuf messages and back: sampling, specs, errors, epochs, timelines. Knows no stream, no state.

Messages come from a peer: `..._from_wire` functions check values that a worker could not run with, and raise typed
errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from ..core.errors import InvalidRequest, TwostrokeError, from_code
from ..core.request import CacheScope, Epoch, FinishReason, Role, SamplingParams, TokenLogprobs
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


def sampling_to_wire(params: SamplingParams) -> common_pb2.SamplingParams:
    """Sampling parameters as a message. It sets every field, so that a worker needs no defaults."""
    return common_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        min_tokens=params.min_tokens,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=dict(params.logit_bias),
        bad_word_ids=[common_pb2.TokenIds(ids=word) for word in params.bad_words],
        include_stop_str_in_output=params.include_stop,
        skip_special_tokens=params.skip_special_tokens,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def sampling_from_wire(message: common_pb2.SamplingParams) -> SamplingParams:
    """Sampling parameters of a router's message. The router has validated them; only values that would break a
    worker are refused here.

    Raises:
        InvalidRequest: `max_tokens` or `seed` is absent, a number has no meaning (NaN, negative temperature), or a
            bad word has no token.
    """
    if not message.HasField("max_tokens") or not message.HasField("seed"):
        raise InvalidRequest("max_tokens and seed must be set on an order to a worker", param="sampling")
    temperature = message.temperature if message.HasField("temperature") else 1.0
    top_p = message.top_p if message.HasField("top_p") else 1.0
    if not 0.0 <= temperature <= 1e6:
        raise InvalidRequest(f"temperature is {temperature}; must be 0 or more", param="temperature")
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequest(f"top_p is {top_p}; must be above 0 and at most 1", param="top_p")
    if message.max_tokens < 1:
        raise InvalidRequest("max_tokens is 0; must be 1 or more", param="max_tokens")
    repetition_penalty = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    if not 0.0 < repetition_penalty < math.inf:
        raise InvalidRequest(
            f"repetition_penalty is {repetition_penalty}; must be above 0 and finite", param="repetition_penalty"
        )
    if not 0.0 <= message.min_p <= 1.0:
        raise InvalidRequest(f"min_p is {message.min_p}; must be from 0 to 1", param="min_p")
    addends = (message.frequency_penalty, message.presence_penalty, *message.logit_bias.values())
    if not all(map(math.isfinite, addends)):
        raise InvalidRequest("a penalty or a bias is not finite", param="sampling")
    if not all(word.ids for word in message.bad_word_ids):
        raise InvalidRequest("bad_word_ids holds a word without tokens", param="bad_words")
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=message.top_k,
        seed=message.seed,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        min_p=message.min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        bad_words=tuple(tuple(word.ids) for word in message.bad_word_ids),
        include_stop=message.include_stop_str_in_output,
        skip_special_tokens=message.skip_special_tokens if message.HasField("skip_special_tokens") else True,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


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


def scope_from_wire(message: worker_pb2.Submit | handover_pb2.Open | handover_pb2.FetchRequest) -> CacheScope:
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
