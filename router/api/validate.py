"""The validator: converts a `GenerateCall` of either API to a `Request`, or to a typed error with field and remedy.

Every client input is checked here before it reaches a worker.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...core.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from ...core.request import HIGHEST_PRIORITY, LOWEST_PRIORITY, AnswerForm, Request
from ...text.fill_in import KNOWN_WORDS, fill_in_prompt
from ...text.parsing.parser import PROMPT_END_CHARS
from ...text.parsing.parsers import NONE
from ...text.tokenizer import TooManyTokens
from ..config import RouterConfig
from ..keys.grants import Grant, KeyRing
from .call import GenerateCall
from .chat import Prompt, chat_prompt
from .checks import integer, least_chars, short, text_of
from .ignored import Ignored
from .models import ServedModel
from .sampling import is_bounded, sampling_of
from .text_work import LARGE_CHARS
from .tools import with_rule

MAX_SALT_CHARS = 1024

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of requests, from the router's configuration."""

    max_choices: int
    default_max_tokens: int | None  # None: as many as fit
    request_timeout_s: float
    keys: KeyRing

    @classmethod
    def of(cls, config: RouterConfig, keys: KeyRing | None = None) -> Limits:
        """Limits of a router's configuration. `keys`: the ring that is kept up to date; None: one of its `api_keys`."""
        ring = KeyRing.of(config.api_keys) if keys is None else keys
        return cls(config.max_choices, config.default_max_tokens, config.request_timeout_s, ring)


def authenticate(api_key: str | None, limits: Limits) -> str:
    """The tenant of a key; without configured keys all clients are one.

    Raises:
        Unauthenticated: keys are configured and this is none of them.
    """
    return limits.keys.grant_of(api_key).tenant


def validate(call: GenerateCall, model: ServedModel, limits: Limits) -> Request:
    """Check every field, render and tokenise. Run it in a thread: it may take milliseconds.

    Raises:
        InvalidRequest: a field is out of range, of the wrong type or not served; `param` names it.
        ContextLengthExceeded: the prompt leaves no room for a token, or not for `max_tokens`.
        ModelNotFound: the key may not use this model.
        Unauthenticated: raised by `KeyRing.grant_of`.
    """
    grant = limits.keys.grant_of(call.api_key)
    grant.check_model(model.name)
    num_choices = integer("n", call.n, 1, 1, limits.max_choices)
    request_id = _request_id(call)
    ignored = Ignored()
    priority = _priority(call, grant, ignored)
    prompt = _prompt(call, model, ignored)
    prompt_ids = _prompt_ids(call, prompt, model)
    if prompt is not None:
        call = with_rule(call, prompt.offered, prompt.text, model, ignored)
    sampling = sampling_of(call, model, prompt_ids, limits.default_max_tokens)
    answer = _answer_form(prompt, model)
    if answer is not None and model.needs_special_tokens:
        answer = replace(answer, hides_special_tokens=sampling.skip_special_tokens)
        sampling = replace(sampling, skip_special_tokens=False)
    return Request(
        request_id=request_id,
        model=model.name,
        adapter=model.adapter,
        base_model=model.base,
        prompt_ids=prompt_ids,
        sampling=sampling,
        num_choices=num_choices,
        isolation_domain=_isolation_domain(grant.isolation_domain, call.cache_salt),
        timeout_s=timeout_of(call, limits),
        is_chat=call.messages is not None,
        tenant=grant.tenant,
        priority=priority,
        allowance=grant.allowance,
        ignored_fields=ignored.names(),
        is_bounded=is_bounded(call, model, limits.default_max_tokens),
        answer=answer,
    )


def _priority(call: GenerateCall, grant: Grant, ignored: Ignored) -> int:
    """Priority of a request: its own, at most its key's. A lower number is served earlier, as in vLLM's API."""
    if call.priority is None:
        return grant.priority
    wanted = integer("priority", call.priority, 0, HIGHEST_PRIORITY, LOWEST_PRIORITY)
    if wanted < grant.priority:
        ignored.add("priority")  # so that who asks for more can see that the key does not give it
    return max(wanted, grant.priority)


def timeout_of(call: GenerateCall, limits: Limits) -> float:
    """Timeout of a request in seconds: the client's, at most the router's."""
    return min(call.timeout_s or limits.request_timeout_s, limits.request_timeout_s)


def num_chars_of(call: GenerateCall) -> int:
    """About the characters to render and tokenise for a call, counted until it is large; 0 for token ids."""
    if isinstance(call.prompt, str):
        return len(call.prompt) + len(call.suffix or "")
    return least_chars((call.messages, call.tools, call.documents), LARGE_CHARS + 1)


def _isolation_domain(tenant: str, salt: str | None) -> str:
    """A tenant's own domain, or its domain for this salt, which has a hash of the salt only."""
    if salt is None:
        return tenant
    if not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} characters; must have 1 to {MAX_SALT_CHARS}, or be left out",
            param="cache_salt",
        )
    digest = hashlib.blake2b(text_of("cache_salt", salt).encode(), digest_size=16, person=b"twostroke-salt")
    return f"{tenant}/salt-{digest.hexdigest()}"


def new_request_id(is_chat: bool) -> str:
    """Random id for a request whose client gave none."""
    return ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12)


def is_request_id(text: str) -> bool:
    """True if a text is a valid request id of a client."""
    return _REQUEST_ID.fullmatch(text) is not None


def _request_id(call: GenerateCall) -> str:
    if not call.request_id:
        return new_request_id(call.messages is not None)
    if not is_request_id(call.request_id):
        raise InvalidRequest(
            f"request_id is {call.request_id[:40]!r}; use 1 to 128 of letters, digits, '.', '_', ':' and '-'",
            param="request_id",
        )
    return call.request_id


def _prompt(call: GenerateCall, model: ServedModel, ignored: Ignored) -> Prompt | None:
    """The rendered prompt of a chat; None: the call gives its prompt."""
    if (call.prompt is None) == (call.messages is None):
        raise InvalidRequest("give exactly one of prompt and messages", param="prompt")
    if call.prompt is not None and len(call.prompt) == 0:
        raise InvalidRequest("prompt is empty; give at least one character or token", param="prompt")
    return None if call.messages is None else chat_prompt(call, model, ignored)


def _answer_form(prompt: Prompt | None, model: ServedModel) -> AnswerForm | None:
    """How to read the answer; None: it is its text."""
    if prompt is None:
        return None
    offered = prompt.offered if model.parsers.tools != NONE else None
    if offered is None and model.parsers.reasoning == NONE:
        return None
    end = prompt.text[-PROMPT_END_CHARS:]
    return AnswerForm(end, offered.tools if offered else None, offered.parallel if offered else True)


def _prompt_ids(call: GenerateCall, prompt: Prompt | None, model: ServedModel) -> tuple[int, ...]:
    if prompt is not None:
        where = "messages"
        ids: Sequence[int] = _encoded(where, prompt.text, model, add_special_tokens=False)
    elif isinstance(call.prompt, str):
        where = "prompt"
        text = call.prompt if call.suffix is None else _between(call.prompt, call.suffix, model)
        ids = _encoded(where, text_of("prompt", text), model, add_special_tokens=True)
    elif call.suffix is not None:
        raise InvalidRequest(
            "suffix is given with token ids; give the prompt as text, or both in one prompt", param="suffix"
        )
    else:
        ids, where = call.prompt or (), "prompt"
        if len(ids) < model.max_model_len:  # else it is refused below by its length
            ids = _token_ids(ids, model)
    if not ids and prompt is not None:
        raise InvalidRequest("messages: the model's chat template makes an empty prompt of them", param=where)
    if not ids:
        raise InvalidRequest(f"{where} is empty; give at least one token", param=where)
    if len(ids) >= model.max_model_len:
        raise ContextLengthExceeded(
            f"{where} has {len(ids)} tokens; the model's context is {model.max_model_len}: shorten it", param=where
        )
    if (beyond := max(ids)) >= model.vocab_size:  # a tokenizer can have more tokens than the model
        raise InvalidRequest(
            f"{where} holds {model.tokenizer.token(beyond)!r}, token {beyond} of the tokenizer; the model has "
            f"{model.vocab_size}: leave it out",
            param=where,
        )
    return tuple(ids)


def _between(before: str, after: str, model: ServedModel) -> str:
    """The prompt for the text between two others."""
    vocabulary = model.tokenizer.backend
    text = fill_in_prompt(before, after, lambda word: vocabulary.token_to_id(word) is not None)
    if text is None:
        raise UnsupportedParameter(
            f"suffix: {model.name} has no tokens for text in the middle (none of {KNOWN_WORDS}); leave it out",
            param="suffix",
        )
    return text


def _encoded(where: str, text: str, model: ServedModel, *, add_special_tokens: bool) -> Sequence[int]:
    """Token ids of a text. A text that is too long is refused as soon as that is certain, before all of it is read."""
    try:
        return model.tokenizer.encode(text, add_special_tokens, most=model.max_model_len)
    except TooManyTokens as error:
        raise ContextLengthExceeded(
            f"{where} has at least {error.least} tokens; the model's context is {model.max_model_len}: shorten it",
            param=where,
        ) from None
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error.message}", param=where) from None


def _token_ids(ids: Sequence[int], model: ServedModel) -> Sequence[int]:
    for place, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(
                f"prompt[{place}] is {short(token_id)}; must be a token id from 0 to {model.vocab_size - 1}",
                param="prompt",
            )
    return ids
