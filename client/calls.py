"""Calls of the SDK as values: the request message, and the conversion of the answer. Knows no channel, no waiting.

`Client` and `AsyncClient` differ only in the way they wait; the common part is here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar

from ..core.errors import InternalError, InvalidRequest, TokensLost
from ..core.request import GRAMMAR_KINDS, FinishReason, TokenLogprobs
from ..core.sampling import FIELDS, Form, SamplingField, SamplingOptions
from ..protos import common_pb2, inference_pb2
from .fields import as_list as _list
from .fields import make_resumable, shown
from .fields import set_field as _set
from .messages import Message, TemplateOptions, add_messages, set_template_options
from .values import Choice, Chunk, Completion, ModelCard, Tokens, ToolCall, Usage

Rpc = Literal[
    "Generate",
    "GenerateStream",
    "Chat",
    "ChatStream",
    "Resume",
    "Tokenize",
    "ListModels",
    "Abort",
    "Explain",
    "Cluster",
]
STREAMS: frozenset[Rpc] = frozenset({"GenerateStream", "ChatStream", "Resume"})
UNARY: tuple[Rpc, ...] = ("Generate", "Chat", "Tokenize", "ListModels", "Abort", "Explain", "Cluster")

Result = TypeVar("Result")


class ModelOption(TypedDict, total=False):
    """The model that a call asks."""

    model: str  # required only if several models are served


class Options(ModelOption, SamplingOptions, total=False):
    """Common keyword options of `generate` and `chat`. An absent option has the model's or the server's default."""

    n: int  # number of choices
    request_id: str  # for `abort` and `explain`; if absent, the server makes one
    user: str
    timeout_s: float  # for the whole call; for a stream, until its end
    resumable: bool  # a stream that is kept for its client: a lost connection is opened again by itself
    idempotency_key: str  # the same key and request: the same answer, also when sent twice
    priority: int  # lower is earlier; the API key's is the default and the earliest that it gives


class GenerateOptions(Options, total=False):
    """Keyword options of `generate`."""

    suffix: str  # text behind the answer, which fills in the middle; for models whose tokenizer has words for that


class ChatOptions(Options, TemplateOptions, total=False):
    """Keyword options of `chat`."""


@dataclass(frozen=True, slots=True)
class Call(Generic[Result]):
    """One call: method, request, timeout, and conversion of the answer. Use it once."""

    rpc: Rpc
    request: Any
    read: Callable[[Any], Result]  # converts the answer, or each message of a stream
    timeout_s: float | None = None  # None: the client's default
    finish: Callable[[], None] = lambda: None  # called when a stream ends without an error; raises if it is incomplete


# ---------------------------------------------------------------- requests


def generate(prompt: str | Sequence[int], options: GenerateOptions) -> Call[Completion]:
    """Complete a text or token ids.

    Raises:
        InvalidRequest: a value has the wrong type or cannot be written to the wire. Names the field.
        TypeError: an option does not exist.
    """
    return Call("Generate", _generate_request(prompt, options), read_completion, options.get("timeout_s"))


def generate_stream(prompt: str | Sequence[int], options: GenerateOptions) -> Call[Chunk]:
    """Complete a text or token ids as a stream; raises as `generate` does."""
    request = _generate_request(prompt, options)
    reader = StreamReader(request.num_choices)
    return Call("GenerateStream", request, reader.read, options.get("timeout_s"), reader.finish)


def chat(messages: Sequence[Message], options: ChatOptions) -> Call[Completion]:
    """Answer a conversation of `{"role": ..., "content": ...}`."""
    return Call("Chat", _chat_request(messages, options), read_completion, options.get("timeout_s"))


def chat_stream(messages: Sequence[Message], options: ChatOptions) -> Call[Chunk]:
    """Answer a conversation as a stream."""
    request = _chat_request(messages, options)
    reader = StreamReader(request.num_choices)
    return Call("ChatStream", request, reader.read, options.get("timeout_s"), reader.finish)


def resume(request_id: str, cursor: str, num_choices: int) -> Call[Chunk]:
    """Go on with a resumable stream after the cursor of the last piece that arrived.

    Raises:
        InvalidRequest: a value cannot be written to the wire.
    """
    request = _set(_set(inference_pb2.ResumeRequest(), "request_id", request_id), "cursor", cursor)
    reader = StreamReader(num_choices, is_resumed=bool(cursor))
    return Call("Resume", request, reader.read, None, reader.finish)


def tokenize(prompt: str | Sequence[Message], model: str, options: TemplateOptions) -> Call[Tokens]:
    """Token ids of a text, or of a conversation rendered by the model's chat template.

    Raises:
        InvalidRequest: as for `add_messages`.
        TypeError: an option does not exist, or the prompt is a text, which takes no options.
    """
    _check_names(options, {} if isinstance(prompt, str) else TemplateOptions.__annotations__)
    request = inference_pb2.TokenizeRequest()
    _set(request, "model", model)
    if isinstance(prompt, str):
        _set(request, "text", prompt, "prompt")
    else:
        request.chat.SetInParent()
        add_messages(request.chat, prompt)
        set_template_options(request.chat.options, options)
    return Call("Tokenize", request, lambda reply: Tokens(tuple(reply.token_ids), reply.max_model_len))


def models() -> Call[tuple[ModelCard, ...]]:
    """List the served models."""
    request = inference_pb2.ListModelsRequest()
    return Call("ListModels", request, lambda reply: tuple(ModelCard(m.id, m.max_model_len) for m in reply.models))


def abort(request_id: str) -> Call[bool]:
    """Cancel a running request; the answer is whether it was found."""
    return Call("Abort", _set(inference_pb2.AbortRequest(), "request_id", request_id), lambda reply: bool(reply.found))


def explain(request_id: str) -> Call[dict[str, Any]]:
    """Explain a request: its workers, the reasons of the choice, and its timeline."""
    return Call("Explain", _set(inference_pb2.ExplainRequest(), "request_id", request_id), read_json)


def cluster() -> Call[dict[str, Any]]:
    """State of the cluster: its workers with their roles and load."""
    return Call("Cluster", inference_pb2.ClusterRequest(), read_json)


def _generate_request(prompt: str | Sequence[int], options: GenerateOptions) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest()
    if isinstance(prompt, str):
        _set(request, "text", prompt, "prompt")
    else:
        request.token_ids.SetInParent()  # keeps an empty prompt present, so that the server can refuse it
        _set(request.token_ids, "ids", _list(prompt, "prompt"), "prompt")
    _check_names(options, GenerateOptions.__annotations__)
    if options.get("suffix"):
        _set(request, "suffix", options["suffix"])
    _fill(request, options)
    return request


def _chat_request(messages: Sequence[Message], options: ChatOptions) -> inference_pb2.ChatRequest:
    request = inference_pb2.ChatRequest()
    add_messages(request, messages)
    _check_names(options, ChatOptions.__annotations__)
    _fill(request, options)
    set_template_options(request.options, options)
    return request


def _check_names(options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"unknown option {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"{list(known)}"))


def _fill(request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest, options: Options) -> None:
    for name in ("model", "request_id", "user", "resumable", "idempotency_key"):
        if name in options:
            _set(request, name, options[name])  # type: ignore[literal-required, unused-ignore]
    if options.get("n") is not None:
        if options["n"] == 0:  # on the wire, 0 means absent
            raise InvalidRequest("n is 0; must be at least 1", param="n")
        _set(request, "num_choices", options["n"], "n")
    priority = options.get("priority")
    if priority is not None:
        if isinstance(priority, bool):  # protobuf would take it for 0 or 1
            raise InvalidRequest(f"priority is {priority}; must be a whole number", param="priority")
        _set(request, "priority", priority)
    request.sampling.SetInParent()
    for field in FIELDS:
        value = options.get(field.api)
        if value is not None:
            _set_sampling(request.sampling, field, value)
    make_resumable(request)


def _set_sampling(sampling: common_pb2.SamplingParams, field: SamplingField, value: Any) -> None:
    if field.form is Form.BIASES:
        _set_biases(sampling, field.api, value)
    elif field.form is Form.GRAMMAR:
        _set_rule(sampling, field.api, value)
    elif field.takes_one and isinstance(value, str):
        _set(sampling, field.api, [value])
    elif field.is_list:
        _set(sampling, field.api, _list(value, field.api))
    elif isinstance(value, bool) != (field.form is Form.FLAG):  # protobuf takes each for the other
        kind = field.form.value if field.form is Form.FLAG else f"a {field.form.value}"
        raise InvalidRequest(f"{field.api} is {shown(value)}; must be {kind}", param=field.api)
    else:
        _set(sampling, field.api, _UNSIGNED.get(field.name, lambda same: same)(value))


_UNSIGNED: Mapping[str, Callable[[Any], Any]] = {
    "seed": lambda seed: seed % 2**64 if isinstance(seed, int) and -(2**63) <= seed < 0 else seed,  # the same 64 bits
    "top_k": lambda top_k: 0 if top_k == -1 else top_k,  # vLLM's word for "off"
}
"""Fields that clients may write with a sign, over HTTP and here, as the wire has them."""


def _set_biases(sampling: common_pb2.SamplingParams, name: str, biases: Any) -> None:
    try:
        given = dict(biases)
        if any(isinstance(bias, bool) for bias in given.values()):
            raise TypeError("a bias is a number")
        getattr(sampling, name).update(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{name} is {shown(biases)}; give {{token id: bias}}: {error}", param=name) from None


def _set_rule(sampling: common_pb2.SamplingParams, name: str, rule: Any) -> None:
    """Write `{kind: rule}`; a rule that is no text, e.g. a JSON schema, is written as JSON."""
    if not isinstance(rule, Mapping) or len(rule) != 1:
        kinds = ", ".join(GRAMMAR_KINDS)
        raise InvalidRequest(f"{name} is {shown(rule)}; give a dict with one of {kinds}", param=name)
    ((kind, source),) = rule.items()
    if kind not in GRAMMAR_KINDS:
        raise InvalidRequest(f"{name} has {shown(kind)}; give one of {', '.join(GRAMMAR_KINDS)}", param=name)
    if not isinstance(source, str) and kind not in ("regex", "grammar"):
        try:
            source = json.dumps(source, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"{name} is {shown(rule)}: {error}", param=name) from None
    _set(getattr(sampling, name), kind, source, name)


# ---------------------------------------------------------------- answers

_FINISH: dict[int, FinishReason | None] = {
    common_pb2.FINISH_REASON_UNSPECIFIED: None,
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    common_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    common_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
    common_pb2.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}


def read_completion(reply: inference_pb2.GenerateResponse) -> Completion:
    """Convert the answer of `generate` or `chat`."""
    return Completion(
        request_id=reply.request_id,
        model=reply.model,
        choices=tuple(
            Choice(
                c.index,
                c.text,
                tuple(c.token_ids),
                _finish(c.finish_reason),
                _logprobs(c.logprobs),
                c.reasoning,
                _calls(c.tool_calls),
            )
            for c in reply.choices
        ),
        usage=_usage(reply.usage),
        prompt_logprobs=_logprobs(reply.prompt_logprobs),
    )


def read_json(reply: inference_pb2.ExplainResponse | inference_pb2.ClusterResponse) -> dict[str, Any]:
    """Parse the JSON document of `explain` or `cluster`. InternalError: it is no JSON object."""
    try:
        document = json.loads(reply.json)
    except ValueError as error:
        raise InternalError(f"the server's answer is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise InternalError(f"the server's answer is a JSON {type(document).__name__}, not an object")
    return document


class StreamReader:
    """Converts the messages of one stream, and detects lost tokens: a gap, a repeat, an early end."""

    def __init__(self, num_choices: int, *, is_resumed: bool = False) -> None:
        """`num_choices` as asked for; 0: not given, which is one. `is_resumed`: earlier pieces are elsewhere."""
        self._num_choices = max(1, num_choices)
        self._is_resumed = is_resumed
        self._next_index: dict[int, int] = {}  # by choice
        self._ended: set[int] = set()
        self._complete = False

    def read(self, message: inference_pb2.GenerateChunk) -> Chunk:
        """Convert the next piece.

        Raises:
            TokensLost: it does not continue the earlier pieces.
        """
        chunk = Chunk(
            request_id=message.request_id,
            model=message.model,
            choice=message.choice,
            text=message.text,
            token_ids=tuple(message.token_ids),
            first_index=message.first_index,
            finish_reason=_finish(message.finish_reason),
            usage=_usage(message.usage) if message.HasField("usage") else None,
            cursor=message.cursor,
            logprobs=_logprobs(message.logprobs),
            prompt_logprobs=_logprobs(message.prompt_logprobs),
            reasoning=message.reasoning,
            tool_calls=_calls(message.tool_calls),
        )
        self._check(chunk)
        return chunk

    def finish(self) -> None:
        """Check that the stream is complete, after the server ended it.

        Raises:
            TokensLost: a choice is unfinished, or the last piece (with `usage`) is missing.
        """
        is_unfinished = len(self._ended) < self._num_choices and not self._is_resumed
        if is_unfinished or not self._complete:
            unfinished = [choice for choice in range(self._num_choices) if choice not in self._ended]
            missing = f"choices {unfinished} are unfinished" if unfinished else "the last piece is missing"
            raise TokensLost(f"the stream stopped early: {missing}")

    def _check(self, chunk: Chunk) -> None:
        if chunk.choice >= self._num_choices:
            raise TokensLost(f"a piece is of choice {chunk.choice}; asked for {self._num_choices}")
        if self._complete:
            raise TokensLost("a piece came after the last one")
        if chunk.token_ids:
            start = chunk.first_index if self._is_resumed else 0
            expected = self._next_index.get(chunk.choice, start)
            if chunk.choice in self._ended or chunk.first_index != expected:
                where = f"request {chunk.request_id}, choice {chunk.choice}"
                raise TokensLost(f"{where}: got tokens from index {chunk.first_index}, expected index {expected}")
            self._next_index[chunk.choice] = expected + len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self._ended.add(chunk.choice)
        self._complete = chunk.usage is not None


def _finish(value: int) -> FinishReason | None:
    return _FINISH.get(value, FinishReason.ERROR)  # an unknown value, of a newer release


def _calls(messages: Iterable[inference_pb2.ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(m.id, m.name, m.arguments) for m in messages)


def _logprobs(messages: Iterable[common_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(m.token_id, m.logprob, m.rank, tuple(zip(m.top_ids, m.top_logprobs, strict=False)))
        for m in messages
    )


def _usage(usage: common_pb2.Usage) -> Usage:
    return Usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        usage.reasoning_tokens,
        usage.draft_tokens,
        usage.accepted_tokens,
    )
