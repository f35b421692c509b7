"""Chat templates: messages to the prompt that the model was trained on. Knows no tokens; the sandbox does the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..core.errors import CheckpointError, InvalidRequest
from .files import read_json, read_text
from .gguf_file import GgufFile, is_gguf
from .gguf_tokenizer import read_templates, special_tokens_of
from .sandbox import LimitExceeded, Limits, MeteredEnvironment
from .special_tokens import special_tokens

MAX_TEMPLATE_CHARS = 256 * 1024
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the first is the one that most templates read


class ChatTemplate:
    """A checkpoint's chat template, or its several named ones. Safe to share between threads."""

    def __init__(
        self,
        source_by_name: Mapping[str, str],
        special: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Compile the templates; "default" is the one used, "tool_use" where tools are given and it exists.

        Raises:
            CheckpointError: one is too large, no template, or uses what the sandbox has not.
        """
        self._limits = limits or Limits()
        self._environment = MeteredEnvironment()
        self._special = dict(special or {})
        self._template_by_name = {name: self._compile(name, source) for name, source in source_by_name.items()}

    @classmethod
    def load(cls, directory: str | Path, limits: Limits | None = None) -> ChatTemplate | None:
        """The template of a checkpoint; None where it has none (a base model).

        `chat_template.jinja` and `additional_chat_templates/*.jinja` go before tokenizer_config.json's
        `chat_template`, which is a string or a list of `{"name", "template"}`. A GGUF file holds its own.

        Raises:
            CheckpointError: a file is broken; names it.
        """
        directory, file = Path(directory), GgufFile(directory) if is_gguf(directory) else None
        sources = read_templates(file) if file else _sources(directory)
        if not sources:
            return None
        try:
            return cls(sources, special_tokens_of(file) if file else special_tokens(directory), limits)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Has its special tokens written out: encode it without adding any.

        `options`: what some templates also ask for, e.g. `enable_thinking`; they hide nothing that is given otherwise.

        Raises:
            InvalidRequest: the template refuses the messages (e.g. an unknown role, or roles out of turn), fails on
                them, or would take more than its limits.
        """
        if not messages:
            raise InvalidRequest("messages is empty; give at least one", param="messages")
        template = self._choose(tools)
        variables = {
            **self._special,
            **(options or {}),
            "messages": [_as_templates_know_it(message) for message in messages],
            "tools": [dict(tool) for tool in tools] if tools is not None else None,
            "documents": [dict(document) for document in documents] if documents is not None else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._environment.render_metered(template, self._limits, variables)
        except LimitExceeded as error:
            raise InvalidRequest(
                f"messages: rendering them with the model's chat template takes {error}; send less", param="messages"
            ) from None
        except jinja2.TemplateError as error:
            raise _refusal(str(error.message or error), messages) from None
        except (MemoryError, RecursionError):
            raise _refusal("they nest too deeply", messages) from None
        except Exception as error:  # a template is foreign code; whatever it raises, its input was not for it
            raise _refusal(f"{type(error).__name__}: {error}", messages) from None

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        name = "tool_use" if tools is not None and "tool_use" in self._template_by_name else "default"
        if name not in self._template_by_name:
            known = ", ".join(sorted(self._template_by_name))
            raise InvalidRequest(f"the model has no default chat template, only: {known}", param="messages")
        return self._template_by_name[name]

    def _compile(self, name: str, source: str) -> jinja2.Template:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(f"chat template {name!r} has {len(source)} characters; at most {MAX_TEMPLATE_CHARS}")
        try:
            return self._environment.compile_metered(source, self._limits)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"chat template {name!r}, line {error.lineno}: {error.message}") from None
        except (LimitExceeded, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise CheckpointError(f"chat template {name!r} cannot be compiled: {error}") from None


def _as_templates_know_it(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without nulls, which many templates fail on, and with its reasoning under the names they ask for."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


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
