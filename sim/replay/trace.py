"""Requests of a replay, read from trace files: arrival, lengths, and the identities of the prompt's blocks.

Formats: `.jsonl` as in Mooncake's release (`timestamp` in ms, `input_length`, `output_length`, `hash_ids`: one id per
512 tokens of the prompt, equal ids are equal prefixes), `.csv` as in Azure's LLM inference traces (`TIMESTAMP`,
`ContextTokens`, `GeneratedTokens`; prompts share nothing). Sources: Mooncake (Qin et al., FAST '25); Splitwise (Patel
et al., ISCA '24). A trace does not name the blocks of answers, so the next turn of a conversation finds only what
another prompt had.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ...kv.block import IDENTITY_BYTES, BlockIdentity

MOONCAKE_BLOCK_TOKENS = 512
PLAIN_BLOCK_TOKENS = 64  # without identities a block only counts room
MAX_TOKENS = 1 << 24  # of one prompt or answer


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a trace."""

    arrived_s: float
    prompt_tokens: int
    answer_tokens: int
    identities: tuple[BlockIdentity, ...] = ()  # of the full blocks of its prompt


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival; the first one arrives at 0."""

    asks: tuple[Ask, ...]
    block_tokens: int  # per identity, and the unit of room in the workers' pools

    @property
    def lasts_s(self) -> float:
        """Time between the first and the last arrival."""
        return self.asks[-1].arrived_s

    def at_rate(self, per_s: float) -> Trace:
        """The same requests with all times stretched, so that they arrive at this mean rate."""
        natural = len(self.asks) / self.lasts_s if self.lasts_s else math.inf
        factor = natural / per_s
        return replace(self, asks=tuple(replace(ask, arrived_s=ask.arrived_s * factor) for ask in self.asks))

    def at_once(self) -> Trace:
        """The same requests in the same order, all waiting from the beginning."""
        return replace(self, asks=tuple(replace(ask, arrived_s=0.0) for ask in self.asks))

    def first(self, count: int) -> Trace:
        """The first requests."""
        return replace(self, asks=self.asks[:count])


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    Raises:
        ConfigError: the file cannot be read; a malformed line is named with its number, the field and its value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no trace: it is not UTF-8 text") from None
    is_mooncake = path.suffix == ".jsonl"
    if not is_mooncake and path.suffix != ".csv":
        raise ConfigError(f"{path} has the ending {path.suffix!r}; must be .jsonl (Mooncake's form) or .csv (Azure's)")
    asks = list(_mooncake(path, text) if is_mooncake else _azure(path, text))
    if not asks:
        raise ConfigError(f"{path} has no requests")
    first_s = min(ask.arrived_s for ask in asks)
    asks = [replace(ask, arrived_s=ask.arrived_s - first_s) for ask in asks]
    asks.sort(key=lambda ask: ask.arrived_s)  # stable: those of one instant stay in the file's order
    return Trace(tuple(asks), MOONCAKE_BLOCK_TOKENS if is_mooncake else PLAIN_BLOCK_TOKENS)


def _mooncake(path: Path, text: str) -> Iterator[Ask]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: must be a JSON object, found {_shown(row)}")
        prompt = _field(where, row, "input_length", _tokens)
        hashes = _field(where, row, "hash_ids", _hashes)
        needed = -(-prompt // MOONCAKE_BLOCK_TOKENS)
        if hashes and len(hashes) != needed:
            raise ConfigError(
                f"{where}: {len(hashes)} hash_ids for an input_length of {prompt}; must be one per "
                f"{MOONCAKE_BLOCK_TOKENS} tokens, here {needed}"
            )
        full = hashes[: prompt // MOONCAKE_BLOCK_TOKENS]
        identities = tuple(BlockIdentity(each.to_bytes(IDENTITY_BYTES, "little")) for each in full)
        arrived_s = _field(where, row, "timestamp", _milliseconds) / 1e3
        yield Ask(arrived_s, prompt, _field(where, row, "output_length", _tokens), identities)


def _azure(path: Path, text: str) -> Iterator[Ask]:
    rows = csv.DictReader(io.StringIO(text))
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    missing = [name for name in columns if name not in (rows.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path}:1: the column {missing[0]} is missing; a trace has {', '.join(columns)}")
    for row in rows:
        where = f"{path}:{rows.line_num}"
        arrived_s = _field(where, row, "TIMESTAMP", _instant)
        prompt, answer = _field(where, row, "ContextTokens", _tokens), _field(where, row, "GeneratedTokens", _tokens)
        yield Ask(arrived_s, prompt, answer)


def _field(where: str, row: dict[str, Any], name: str, read: Callable[[Any], Any]) -> Any:
    if row.get(name) is None:
        raise ConfigError(f"{where}: {name} is missing")
    try:
        return read(row[name])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {name} is {_shown(row[name])}; {error}") from None


def _tokens(value: Any) -> int:
    """A number of tokens. Zero counts as one: Azure's traces have empty answers."""
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        number = int(value)
    except (ValueError, TypeError):
        raise ValueError("must be a whole number of tokens") from None
    if not 0 <= number <= MAX_TOKENS:
        raise ValueError(f"must be from 0 to {MAX_TOKENS}")
    return max(1, number)


def _milliseconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:
        raise ValueError("must be milliseconds from 0 on")
    return float(value)


def _instant(value: str) -> float:
    try:
        return datetime.fromisoformat(value[:26]).timestamp()  # microseconds; the traces have a digit more
    except ValueError:
        raise ValueError("must be a time such as 2023-11-16 18:15:46.680590") from None


def _hashes(value: Any) -> list[int]:
    if not isinstance(value, list) or not _are_ids(value):
        raise ValueError("must be a list of whole numbers from 0 on")
    return value


def _are_ids(values: Iterable[Any]) -> bool:
    return all(type(each) is int and 0 <= each < 1 << 120 for each in values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
