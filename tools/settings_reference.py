"""Writes `docs/settings.md`: every key of the configuration, from its model.

python tools/settings_reference.py           writes the page
python tools/settings_reference.py --check   exits with 1 if the written page differs
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from twostroke.cli.options import SETTING_BY_FLAG
from twostroke.cli.serve import serve
from twostroke.cluster.config import ENVIRONMENT_PREFIX, Config
from twostroke.core.config import Section

FILE = Path(__file__).resolve().parents[1] / "docs/settings.md"

HEAD = """# Settings

Made by `make docs` from the configuration's model; do not edit.

Each key is a line of a file (`--config FILE`, YAML: `cache: {block_size: 32}`) and an environment variable
(`TWOSTROKE__CACHE__BLOCK_SIZE=32`, its value as in YAML); some have a flag of `serve` and `up`. Flags win over
variables, those over the file. An unknown key is an error that names the nearest. `twostroke serve --dry-run` shows
what a machine decides for keys that are not given.
"""

_UNITS = (  # by the end of a key's name, the longest first
    ("_bytes_per_s", "bytes/s"),
    ("_bytes", "bytes"),
    ("_ms", "ms"),
    ("_s", "s"),
    ("_fraction", "share"),
    ("tokens", "tokens"),
)
_UNIT_BY_KEY = {
    "cache.block_size": "tokens",
    "cache.swap_space": "GiB",
    "model.max_model_len": "tokens",
    "speculation.prompt_lookup_max": "tokens",
    "speculation.prompt_lookup_min": "tokens",
    "planner.log_decisions": "",
}
_FLAG_BY_PARAMETER = {"api_keys": "--api-key"}  # the others are the parameter with dashes
_NAME_BY_TYPE = {"str": "text", "bool": "true, false", "int": "integer", "float": "number", "Path": "path"}
_SIGNS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
_UNITS_OF_BYTES = ((30, "GiB"), (20, "MiB"), (10, "KiB"))


class Setting(NamedTuple):
    """One key of the configuration."""

    key: str  # "router.port"; "[]" behind a key: of each element of a list
    field: FieldInfo

    @property
    def variable(self) -> str:
        """Its environment variable; empty for a key of a list's elements."""
        return "" if "[]" in self.key else ENVIRONMENT_PREFIX + self.key.replace(".", "__").upper()


def settings_of(kind: type[Section], path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """All keys of a section and of those inside it, in the order of the model."""
    for name, field in kind.model_fields.items():
        inner, is_list = _section_in(field.annotation)
        if inner is None or path:
            yield Setting(".".join((*path, name)), field)
        if inner is not None:
            yield from settings_of(inner, (*path, name + ("[]" if is_list else "")))


def page() -> str:
    """The page's text."""
    offered = inspect.signature(serve).parameters
    flags = {key: f"--{flag.replace('_', '-')}" for flag, key in SETTING_BY_FLAG.items() if flag in offered}
    flags |= {SETTING_BY_FLAG[name]: flag for name, flag in _FLAG_BY_PARAMETER.items()}
    lines = [HEAD]
    for section, field in Config.model_fields.items():
        kind, _ = _section_in(field.annotation)
        assert kind is not None
        meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        lines += [f"## {section}", "", meaning, "", "| key | type | default | unit | meaning | variable, flag |"]
        lines += ["|---|---|---|---|---|---|"]
        for setting in settings_of(kind, (section,)):
            ways = [f"`{way}`" for way in (setting.variable, flags.get(setting.key, "")) if way]
            cells = [
                f"`{setting.key}`",
                type_of(setting.field),
                default_of(setting),
                unit_of(setting.key),
                setting.field.description or "",
                " ".join(ways),
            ]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def type_of(field: FieldInfo) -> str:
    """Type and bounds, as text."""
    named = [_type_name(part) for part in _parts(field.annotation)]
    bounds = [f"{sign} {getattr(rule, name)}" for rule in _rules(field) for name, sign in _SIGNS if hasattr(rule, name)]
    return " ".join([" or ".join(dict.fromkeys(named)), ", ".join(bounds)]).strip()


def default_of(setting: Setting) -> str:
    """Value of a key that is not given, as text."""
    field, unit = setting.field, unit_of(setting.key)
    if field.default_factory is not None:
        return "made anew at each start"
    value = field.default
    if value is PydanticUndefined:
        return "must be given"
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value) or "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        whole = str(value) if isinstance(value, int) or value != int(value) else str(int(value))
        power = next(((bits, name) for bits, name in _UNITS_OF_BYTES if value and value % (1 << bits) == 0), None)
        return f"{whole} ({int(value) >> power[0]} {power[1]})" if power and unit.startswith("bytes") else whole
    return f"`{value}`"


def unit_of(key: str) -> str:
    """Unit of a key's value; empty: it has none."""
    found = next((unit for end, unit in _UNITS if key.endswith(end)), "")
    return _UNIT_BY_KEY.get(key, found)


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Alternatives of a type, without None, and without what is annotated to it."""
    if hasattr(annotation, "__metadata__"):
        return _parts(annotation.__origin__)
    if get_origin(annotation) in (None, Literal, tuple):
        return () if annotation is type(None) else (annotation,)
    return tuple(part for each in get_args(annotation) for part in _parts(each))


def _rules(field: FieldInfo) -> list[Any]:
    inside = [rule for each in get_args(field.annotation) for rule in getattr(each, "__metadata__", ())]
    return [*field.metadata, *(more for rule in inside for more in getattr(rule, "metadata", [rule]))]


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(str(each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        return "list of texts" if element is str else f"list of {_type_name(element)}"
    return "keys below" if issubclass(kind, Section) else _NAME_BY_TYPE[kind.__name__]


def _section_in(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a field holds, and whether as elements of a list."""
    for part in _parts(annotation):
        inner = get_args(part)[0] if get_origin(part) is tuple else part
        if isinstance(inner, type) and issubclass(inner, Section):
            return inner, inner is not part
    return None, False


def main() -> int:
    """Write the page, or compare it; returns the exit code."""
    if "--check" not in sys.argv[1:]:
        FILE.write_text(page(), encoding="utf-8")
        return 0
    if FILE.exists() and FILE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{FILE.name} differs from the configuration's model; run make docs")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
