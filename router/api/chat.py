"""Renders a chat with the model's template and the client's template options to text. Knows no HTTP and no tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...core.errors import InvalidRequest, UnsupportedParameter
from ...text.templates.conversation import Placed, adapt
from ...text.templates.template import ChatTemplate, Rendered
from ...text.templates.traits import TemplateTraits
from .call import GenerateCall
from .checks import deeper_than, short, text_of
from .ignored import Ignored
from .messages import check_messages
from .models import ServedModel
from .tools import Offered, offered_tools

MAX_KWARGS = 64
MAX_DEPTH = 16  # of a template's option or document
MAX_DOCUMENTS = 1024
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_OWN_FIELDS = ("tools", "documents", "add_generation_prompt", "continue_final_message", "messages")


@dataclass(frozen=True, slots=True)
class Wishes:
    """Checked options of a call for the rendering of its messages."""

    add_generation_prompt: bool
    continue_final_message: bool
    documents: Sequence[Mapping[str, Any]] | None
    options: dict[str, Any]


class Prompt(NamedTuple):
    """Text of a prompt, special tokens written out, and the tools that it offers."""

    text: str
    offered: Offered | None


def chat_prompt(call: GenerateCall, model: ServedModel, ignored: Ignored) -> Prompt:
    """Render a chat. Fields without effect are added to `ignored`.

    Raises:
        InvalidRequest: a field is wrong, or the template would drop a field that changes the meaning; `param` names it.
    """
    template = model.template
    if template is None:
        raise InvalidRequest(f"{model.name} has no chat template; use completions", param="messages")
    wishes = _wishes(call, template, ignored)
    offered = offered_tools(call, model)
    sent = call.messages or ()
    placed = adapt(check_messages(sent, ignored), template.traits)
    rendered = template.render_traced(
        [message for _, message in placed],
        wishes.add_generation_prompt,
        offered.tools if offered else None,
        documents=wishes.documents,
        options=wishes.options,
        continue_final_message=wishes.continue_final_message,
        keep_null_content=True,
    )
    _tell_unread(sent, placed, rendered, template.traits, ignored)
    return Prompt(text_of("messages", rendered.text), offered)


def _tell_unread(
    sent: Sequence[Mapping[str, Any]],
    placed: Sequence[Placed],
    rendered: Rendered,
    traits: TemplateTraits,
    ignored: Ignored,
) -> None:
    """Refuse fields of the sent messages that must not be dropped by the template; note other unread fields."""
    by_order = _told_by_order(placed)
    for (place, message), unread in zip(placed, rendered.unread, strict=True):
        without_text = "tool_calls" in message and traits.call_form is not None and not traits.call_form.shows_text
        if message.get("content") and (without_text or message["role"] in traits.vanishing_roles):
            ignored.add("messages", "content")
        for name in unread:
            if name == "tool_calls":
                raise InvalidRequest(
                    f"messages[{place}].tool_calls: the model's chat template leaves them out here; "
                    "leave them out, or send the message without content",
                    param=f"messages[{place}].tool_calls",
                )
            # Results of `function_call` get an id from us, and those in the order of their calls need none.
            given = name != "tool_call_id" or (name in sent[place] and place not in by_order)
            if name != "role" and message[name] and given:
                ignored.add("messages", name)


def _told_by_order(placed: Sequence[Placed]) -> set[int]:
    """Places of the tool results that stand in the order of their calls: which call each belongs to is seen."""
    found: set[int] = set()
    expected: list[Any] = []
    for place, message in placed:
        if message["role"] != "tool":
            expected = [call.get("id") for call in message.get("tool_calls", ())]
        elif expected and message.get("tool_call_id") == expected.pop(0):
            found.add(place)
        else:
            expected = []
    return found


# ---------------------------------------------------------------- template options beside messages


def _wishes(call: GenerateCall, template: ChatTemplate, ignored: Ignored) -> Wishes:
    continues = _flag("continue_final_message", call.continue_final_message, False)
    if continues and call.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt are both true; an answer either goes on or begins",
            param="continue_final_message",
        )
    prompts = not continues and _flag("add_generation_prompt", call.add_generation_prompt, True)
    return Wishes(prompts, continues, _documents(call.documents, template), _options(call, template, ignored))


def _flag(name: str, value: Any, default: bool) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {short(value)}; must be true or false", param=name)
    return value


def _documents(documents: Any, template: ChatTemplate) -> Sequence[Mapping[str, Any]] | None:
    if not documents:
        return None
    if not isinstance(documents, (list, tuple)) or not all(isinstance(one, Mapping) for one in documents):
        raise InvalidRequest(
            f"documents is {short(documents)}; must be a list of objects with title and text", param="documents"
        )
    if len(documents) > MAX_DOCUMENTS or deeper_than(documents, MAX_DEPTH):
        raise InvalidRequest(
            f"documents has {len(documents)} entries; at most {MAX_DOCUMENTS}, nested at most {MAX_DEPTH} deep",
            param="documents",
        )
    if not template.asks_for("documents"):
        raise UnsupportedParameter(
            "documents: the model's chat template reads none; put them into a message", param="documents"
        )
    return documents


def _options(call: GenerateCall, template: ChatTemplate, ignored: Ignored) -> dict[str, Any]:
    """`chat_template_kwargs`, with `reasoning_effort` among them."""
    given = call.chat_template_kwargs
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"chat_template_kwargs is {short(given)}; must be an object", param="chat_template_kwargs")
    if len(given) > MAX_KWARGS or deeper_than(given, MAX_DEPTH):
        raise InvalidRequest(
            f"chat_template_kwargs has {len(given)} names; at most {MAX_KWARGS}, nested at most {MAX_DEPTH} deep",
            param="chat_template_kwargs",
        )
    for name in given:
        _check_name(name, template)
        if not template.asks_for(name):
            ignored.add("chat_template_kwargs", name)
    return dict(given) | _effort(call.reasoning_effort, given, template, ignored)


def _check_name(name: Any, template: ChatTemplate) -> None:
    where = f"chat_template_kwargs.{str(name)[:64]}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"chat_template_kwargs has the name {short(name)}; names are of letters, digits and '_'", param=where
        )
    if name in _OWN_FIELDS:
        raise InvalidRequest(f"{where} is set by the request's own fields; give {name} beside messages", param=where)
    if name == "chat_template" or template.is_reserved(name):
        raise InvalidRequest(f"{where} is the model's own; leave it out", param=where)


def _effort(effort: Any, given: Mapping[str, Any], template: ChatTemplate, ignored: Ignored) -> dict[str, Any]:
    """Variables set by `reasoning_effort`, as in vLLM: that name, and `enable_thinking` unless it is given."""
    name = "reasoning_effort"
    if effort is None:
        return {}
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise InvalidRequest(f"{name} is {short(effort)}; must be one of {', '.join(EFFORTS)}", param=name)
    if given.get(name, effort) != effort:
        raise InvalidRequest(f"{name} and chat_template_kwargs.{name} differ; give one", param=name)
    meant: dict[str, Any] = {name: effort}
    if "enable_thinking" not in given:
        meant["enable_thinking"] = effort != "none"
    read = {key: value for key, value in meant.items() if template.asks_for(key)}
    if not read:
        ignored.add(name)
    return read
