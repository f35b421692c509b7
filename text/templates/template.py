"""Chat templates: render messages to the model's prompt format, in the sandbox. Knows no tokens."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from ...checkpoint.gguf.file import GgufFile, is_gguf
from ...checkpoint.gguf.special_ids import special_tokens_of
from ...core.errors import CheckpointError, InvalidRequest
from ..files import read_json, read_text
from ..gguf_tokenizer import read_templates
from ..special_tokens import SPECIAL_NAMES, special_tokens
from .continuation import cut_at_tag, with_tag
from .sandbox import LimitExceeded, Limits, MeteredEnvironment
from .tracked import TrackedMessage, unread
from .traits import Render, TemplateTraits, find_traits

MAX_TEMPLATE_CHARS = 256 * 1024
REASONING = ("reasoning_content", "thinking", "reasoning")  # most templates read the first
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"self", "super", "loop", "caller", "varargs", "kwargs"}  # names of jinja2
)
_PROBE_WORK = 200_000  # limit of one probe of the template's traits; small chats need a few thousand


@dataclass(frozen=True, slots=True)
class Rendered:
    """Prompt, and the fields of the messages that the template did not read."""

    text: str
    unread: tuple[tuple[str, ...], ...]  # per message: names of unread fields


class ChatTemplate:
    """One or several named chat templates of a checkpoint. Safe to share between threads."""

    def __init__(
        self,
        source_by_name: Mapping[str, str],
        special: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Compile the templates. "default" is used, or "tool_use" if it exists and tools are given.

        Raises:
            CheckpointError: a template is too large, invalid, or uses features that the sandbox refuses.
        """
        self._limits = limits or Limits()
        self._environment = MeteredEnvironment()
        self._special = dict(special or {})
        self.source = "\n".join(source_by_name.values())  # of all templates
        self._variables: set[str] = set()  # names of variables in the templates
        self._fields: set[str] = set()  # names of fields in the templates
        self._template_by_name = {name: self._compile(name, source) for name, source in source_by_name.items()}
        self._traits: TemplateTraits | None = None
        self._finding_traits = threading.Lock()

    @classmethod
    def load(
        cls, directory: str | Path, limits: Limits | None = None, *, given: str | None = None
    ) -> ChatTemplate | None:
        """Load the templates of a checkpoint; None if it has none (a base model).

        `given`: source of the only template instead; it gets the checkpoint's special tokens.

        `chat_template.jinja` and `additional_chat_templates/*.jinja` have precedence over tokenizer_config.json's
        `chat_template`, which is a string or a list of `{"name", "template"}`. A GGUF file contains its own.

        Raises:
            CheckpointError: a file is broken; names it.
        """
        directory, file = Path(directory), GgufFile(directory) if is_gguf(directory) else None
        sources = {"default": given} if given is not None else read_templates(file) if file else _sources(directory)
        if not sources:
            return None
        try:
            return cls(sources, special_tokens_of(file) if file else special_tokens(directory), limits)
        except CheckpointError as error:
            place = directory if given is None else "the given chat template"
            raise CheckpointError(f"{place}: {error.message}") from None

    @property
    def traits(self) -> TemplateTraits:
        """Traits of the default template; found at the first use, in some milliseconds."""
        with self._finding_traits:
            if self._traits is None:
                self._traits = find_traits(self._probe())
            return self._traits

    def asks_for(self, name: str) -> bool:
        """Return whether a template uses a variable with this name."""
        return name in self._variables

    def is_reserved(self, name: str) -> bool:
        """Return whether an option with this name would hide another variable of the template."""
        return any(name in names for names in (_RESERVED, SPECIAL_NAMES, self._special, self._environment.globals))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the prompt only, as `render_traced` does."""
        return self.render_traced(messages, add_generation_prompt, tools, documents=documents, options=options).text

    def render_traced(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        keep_null_content: bool = False,
        limits: Limits | None = None,
    ) -> Rendered:
        """Render the prompt. It contains its special tokens: encode it without adding any.

        `options`: further variables for the template, e.g. `enable_thinking`; reserved names stay as they are.
        `continue_final_message`: the prompt ends within the last message, right after its text.
        `keep_null_content`: the template gets null content; else it is absent, as all nulls are.

        Raises:
            InvalidRequest: the template refuses the messages (e.g. an unknown role, or a wrong order of roles), fails
                on them, or exceeds its limits.
        """
        if not messages:
            raise InvalidRequest("messages is empty; give at least one", param="messages")
        template = self._choose(tools)
        tracked = [TrackedMessage(self._as_templates_know_it(message, keep_null_content)) for message in messages]
        if continue_final_message:
            tracked[-1] = TrackedMessage(with_tag(tracked[-1]))
        variables = {
            **self._special,
            **(options or {}),
            "messages": list(tracked),
            "tools": [dict(tool) for tool in tools] if tools is not None else None,
            "documents": [dict(document) for document in documents] if documents is not None else None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(template, variables, messages, limits or self._limits)
        if continue_final_message:
            text = cut_at_tag(text, messages[-1]["content"])
        return Rendered(text, tuple(map(_unread, messages, tracked)))

    def _run(
        self,
        template: jinja2.Template,
        variables: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        limits: Limits,
    ) -> str:
        try:
            return self._environment.render_metered(template, limits, variables)
        except LimitExceeded as error:
            raise InvalidRequest(
                f"messages: rendering them with the model's chat template takes {error}; send less", param="messages"
            ) from None
        except jinja2.TemplateError as error:
            raise _refusal(str(error.message or error), messages) from None
        except (MemoryError, RecursionError):
            raise _refusal("they nest too deeply", messages) from None
        except Exception as error:  # a template is foreign code: any error means that it cannot take this input
            raise _refusal(f"{type(error).__name__}: {error}", messages) from None

    def _probe(self) -> Render:
        """Make the render function for probes. After one probe exceeds its limits, all further ones return None."""
        limits = replace(self._limits, max_work=min(_PROBE_WORK, self._limits.max_work))
        given_up = False

        def render(messages: Sequence[Mapping[str, Any]]) -> str | None:
            nonlocal given_up
            if given_up:
                return None
            try:
                return self.render_traced(messages, keep_null_content=True, limits=limits).text
            except InvalidRequest as error:
                given_up = isinstance(error.__context__, LimitExceeded)
                return None

        return render

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        name = "tool_use" if tools is not None and "tool_use" in self._template_by_name else "default"
        if name not in self._template_by_name:
            known = ", ".join(sorted(self._template_by_name))
            raise InvalidRequest(f"the model has no default chat template, only: {known}", param="messages")
        return self._template_by_name[name]

    def _as_templates_know_it(self, message: Mapping[str, Any], keep_null_content: bool) -> dict[str, Any]:
        """Copy of a message without nulls, which many templates cannot take, with its reasoning under known names."""
        kept = {
            name: value
            for name, value in message.items()
            if value is not None or (keep_null_content and name == "content")
        }
        reasoning = next((kept[name] for name in REASONING if name in kept), None)
        if reasoning is None:
            return kept
        if self._fields.isdisjoint(("reasoning_content", "thinking")):
            kept.setdefault("reasoning", reasoning)
        return {"thinking": reasoning, **kept, "reasoning_content": reasoning}

    def _compile(self, name: str, source: str) -> jinja2.Template:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(f"chat template {name!r} has {len(source)} characters; at most {MAX_TEMPLATE_CHARS}")
        try:
            compiled = self._environment.compile_metered(source)
            tree = self._environment.parse(source)
            self._variables |= {node.name for node in tree.find_all(nodes.Name)}
            self._fields |= _fields_in(tree)
            return compiled
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"chat template {name!r}, line {error.lineno}: {error.message}") from None
        except (RecursionError, MemoryError):
            raise CheckpointError(f"chat template {name!r} cannot be compiled: it nests too deeply") from None
        except (SyntaxError, ValueError) as error:
            raise CheckpointError(f"chat template {name!r} cannot be compiled: {error}") from None


def _unread(given: Mapping[str, Any], tracked: TrackedMessage) -> tuple[str, ...]:
    """Names of given fields that were not read. Reasoning counts as read under any of its names."""
    names = unread(tracked)
    aliases = [name for name in REASONING if dict.__contains__(tracked, name)]
    if not set(aliases) <= set(names):
        names = tuple(name for name in names if name not in aliases)
    return tuple(name for name in names if given.get(name) is not None)


def _fields_in(tree: nodes.Template) -> set[str]:
    """Collect all possible names of fields: `m.x`, `m["x"]`, `m.get("x")`, `attribute="x"`."""
    found: set[str] = {node.attr for node in tree.find_all(nodes.Getattr)}
    return found | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}


def _refusal(reason: str, messages: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    roles = Counter(str(message.get("role"))[:40] for message in messages)
    shown = ", ".join(f"{count} × {role}" for role, count in list(roles.items())[:10])
    return InvalidRequest(
        f"the model's chat template cannot take these messages: {reason[:500]} (roles: {shown or 'none'})",
        param="messages",
    )


def _sources(directory: Path) -> dict[str, str]:
    found = _config_sources(directory / "tokenizer_config.json")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = read_text(path)
    if (directory / "chat_template.jinja").is_file():
        found["default"] = read_text(directory / "chat_template.jinja")
    return found


def _config_sources(path: Path) -> dict[str, str]:
    value = read_json(path, optional=True).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        found = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        found = {"": None}
    if not all(isinstance(name, str) and isinstance(source, str) for name, source in found.items()):
        raise CheckpointError(f"{path}: chat_template must be a string, or a list of objects with name and template")
    return found
