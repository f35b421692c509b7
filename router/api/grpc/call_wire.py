"""Conversion of gRPC messages to calls: fields by their API names; lists are counted before they are copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from ....core.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest
from ....protos import inference_pb2
from ..call import GenerateCall
from ..models import ModelDirectory
from .chat_wire import chat_messages, template_options

_USUAL_COMPLETION = 256  # default max_tokens of a completion; without a template it may never end by itself
_OPTIONAL = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "logprobs", "prompt_logprobs"),
)


@dataclass(frozen=True, slots=True)
class Said:
    """A message with its key and deadline."""

    message: Any
    api_key: str | None
    left_s: float | None  # until the client's deadline; None: it has no deadline
    models: ModelDirectory


Reader: TypeAlias = Callable[[Said], GenerateCall]


def generate_call(said: Said) -> GenerateCall:
    """Call of a completion.

    Raises:
        InvalidRequest: there is no prompt, or a field has an invalid value.
        ContextLengthExceeded: the prompt has too many tokens for its model.
        ModelNotFound, Unavailable: no worker serves that model.
        DeadlineExceeded: the client's deadline is over.
    """
    message: inference_pb2.GenerateRequest = said.message
    which = message.WhichOneof("prompt")
    if which is None:
        raise InvalidRequest("prompt is missing; give text or token_ids", param="prompt")
    prompt = message.text if which == "text" else _token_ids(said)
    return GenerateCall(prompt=prompt, usual_max_tokens=_USUAL_COMPLETION, **_common(said))


def chat_call(said: Said) -> GenerateCall:
    """Call of a chat. Raises the errors of `generate_call`."""
    message: inference_pb2.ChatRequest = said.message
    return GenerateCall(messages=chat_messages(message.messages), **template_options(message.options), **_common(said))


def tokenize_call(said: Said) -> GenerateCall:
    """Call of a tokenisation, as a request for one token. Raises the errors of `generate_call`."""
    message: inference_pb2.TokenizeRequest = said.message
    which = message.WhichOneof("input")
    if which is None:
        raise InvalidRequest("input is missing; give text or chat", param="input")
    return GenerateCall(
        model=message.model or None,
        prompt=message.text if which == "text" else None,
        messages=chat_messages(message.chat.messages) if which == "chat" else None,
        **template_options(message.chat.options),
        max_tokens=1,
        api_key=said.api_key,
        timeout_s=_timeout_s(said),
    )


def _token_ids(said: Said) -> list[int]:
    ids = said.message.token_ids.ids
    most = said.models.facts(said.message.model).max_model_len
    if len(ids) >= most:
        raise ContextLengthExceeded(
            f"prompt has {len(ids)} tokens; the model's context is {most}: shorten it", param="prompt"
        )
    return list(ids)


def _common(said: Said) -> dict[str, Any]:
    message, sampling = said.message, said.message.sampling
    given = {name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)}
    if sampling.bad_word_ids:
        raise InvalidRequest("bad_word_ids are the router's to make; give bad_words", param="bad_word_ids")
    if "seed" in given and given["seed"] >= 1 << 63:
        given["seed"] -= 1 << 64  # the validator takes signed seeds, as JSON clients send them
    return given | {
        "model": message.model or None,
        "n": message.num_choices or None,
        "stop": tuple(sampling.stop),
        "stop_token_ids": tuple(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "include_stop_str_in_output": sampling.include_stop_str_in_output,
        "skip_special_tokens": sampling.skip_special_tokens if sampling.HasField("skip_special_tokens") else True,
        "logit_bias": dict(sampling.logit_bias),
        "bad_words": tuple(sampling.bad_words),
        "request_id": message.request_id or None,
        "api_key": said.api_key,
        "timeout_s": _timeout_s(said),
    }


def _timeout_s(said: Said) -> float | None:
    if said.left_s is not None and said.left_s <= 0:
        raise DeadlineExceeded("the client's deadline was over when its call was read")
    return said.left_s
