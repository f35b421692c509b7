"""Base class of every config section: unknown keys are errors that name the nearest key. Knows no section."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError


class Section(BaseModel):
    """Group of settings owned by one part. Frozen; validated when it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)


def as_word(value: Any) -> Any:
    """The words "on" and "off" where YAML has made a truth value of them: for settings that have other words, too."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


S = TypeVar("S", bound=Section)

MOST_ECHOED = 200  # characters of a wrong value
_SECRETS = frozenset({"key", "api_keys", "cluster_key", "operator_key"})  # errors never show their values


def load_section(kind: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Build a section from plain values.

    Raises:
        ConfigError: a key is unknown (names the nearest one) or a value is out of range (names value and rule).
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(kind, error, where)) from None


def explain(kind: type[BaseModel], error: ValidationError, where: str = "") -> str:
    """Message for a user, one line per problem: path, value, remedy."""
    lines = []
    for problem in error.errors():
        path = ".".join([*([where] if where else []), *(str(part) for part in problem["loc"])])
        if problem["type"] == "extra_forbidden":
            known = _keys_at(kind, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            lines.append(f"{path} is not a setting; {hint}")
        else:
            value = problem["input"]
            is_secret = _SECRETS & set(problem["loc"]) or isinstance(value, (dict, list))  # may hold a secret
            text = problem["msg"].removeprefix("Value error, ")
            if problem["type"] in ("model_type", "model_attributes_type"):
                text = "must be a mapping of its settings"
            if problem["type"] == "tuple_type":
                text = f'must be a JSON list, e.g. ["…"], not {type(value).__name__}'
            lines.append(f"{path}: {text}" if is_secret else f"{path} is {_short(value)}: {text}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_ECHOED else f"{text[:MOST_ECHOED]}…"


def _keys_at(kind: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        kind = inner
    return list(kind.model_fields)
