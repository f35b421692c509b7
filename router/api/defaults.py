"""Sampling defaults of a checkpoint, for fields that a request does not give. Knows files and fields, no request.

From generation_config.json, or a GGUF file's `general.sampling.*`. Settings that would change the answer and are not
served are refused by name. Source: transformers' GenerationConfig; llama.cpp's model-embedded sampling parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.gguf.file import GgufFile, StoredArray, is_gguf
from ...core.errors import CheckpointError, InvalidRequest
from ...core.sampling import FIELD_BY_NAME, FIELDS, MOST_INT32, Form, SamplingField
from ...text.files import read_json
from .checks import integer, number, short

MAX_BANNED_WORDS = 1024

_FILE = "generation_config.json"
_REMEDY = "correct it, or set model.generation_config: none to go without the checkpoint's defaults"

# Settings of transformers' generate() that are not served, with the values that have no effect (beside null).
_NOT_SERVED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "diversity_penalty": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "sequence_bias": ({}, []),
    "begin_suppress_tokens": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": ([],),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "dola_layers": (),
}
_NOT_SERVED_GGUF: Mapping[str, tuple[Any, ...]] = {"xtc_probability": (0,), "mirostat": (0,)}
_GGUF_NAMES = {field.gguf: field.checkpoint for field in FIELDS if field.gguf and field.checkpoint}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values of `SamplingParams` for what a request leaves out: every field whose row has a name in checkpoints."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None  # None: the default of the API, or the context's length
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> SamplingDefaults:
        """Read the defaults of a checkpoint, a directory or a GGUF file.

        Raises:
            CheckpointError: a value is invalid or not served; the message names file, field and remedy.
        """
        if is_gguf(path):
            return _checked(_from_gguf(GgufFile(path), str(path)), vocab_size, str(path))
        file = path / _FILE
        given = {k: v for k, v in read_json(file, optional=True).items() if v is not None}
        for name, neutral in _NOT_SERVED.items():
            if name in given and not _is_one_of(given[name], neutral):
                raise _wrong(str(file), name, given[name], "which is not served")
        return _checked(given, vocab_size, str(file))

    @property
    def told(self) -> dict[str, Any]:
        """Values that differ from neutral sampling, by name."""
        neutral = asdict(SamplingDefaults())
        return {name: value for name, value in asdict(self).items() if value != neutral[name]}


NO_DEFAULTS = SamplingDefaults()


def described(defaults: SamplingDefaults) -> str:
    """`told` as one line of text for display; empty if there is no difference."""
    return ", ".join(f"{name} {short(value)}" for name, value in defaults.told.items())


def _from_gguf(file: GgufFile, where: str) -> dict[str, Any]:
    prefix = "general.sampling."
    found = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    for name, neutral in _NOT_SERVED_GGUF.items():
        if name in found and not _is_one_of(found[name], neutral):
            raise _wrong(where, prefix + name, found[name], "which is not served")
    last = found.get("penalty_last_n", -1)
    if last == 0:
        found.pop("penalty_repeat", None)
    elif last != -1 and found.get("penalty_repeat", 1) != 1:
        raise _wrong(where, prefix + "penalty_last_n", last, "and penalties count the whole text here")
    given = {theirs: found[ours] for ours, theirs in _GGUF_NAMES.items() if ours in found}
    # GGUF stores float32: 0.95 is read as 0.949999988.
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in given.items()}


def _checked(given: Mapping[str, Any], vocab_size: int, where: str) -> SamplingDefaults:
    values: dict[str, Any] = {}
    try:
        for field in FIELDS:
            if field.checkpoint:
                read = OWN_READERS.get(field.name)
                values[field.name] = read(given, vocab_size) if read else _read(field, field.checkpoint, given)
        found = SamplingDefaults(**values)
    except InvalidRequest as error:
        raise CheckpointError(f"{where}: {error.message}; {_REMEDY}") from None
    if given.get("do_sample", True) is True:
        return found
    if given["do_sample"] is not False:
        raise _wrong(where, "do_sample", given["do_sample"], "and must be true or false")
    return SamplingDefaults(**{**{f: getattr(found, f) for f in found.__slots__}, "temperature": 0.0})


def _read(field: SamplingField, name: str, given: Mapping[str, Any]) -> Any:
    """The default that a checkpoint gives under `name`, within the field's bounds. Raises InvalidRequest."""
    value, default = given.get(name), getattr(NO_DEFAULTS, field.name)
    low = field.low if field.least_default is None else field.least_default
    if field.form is Form.NUMBER:
        return number(name, value, default, low, field.high)
    if field.form is Form.WHOLE:
        return integer(name, value, default, int(low), int(field.high))
    raise AssertionError(f"the default of {field.name} needs a reader of its own")


def _top_k(given: Mapping[str, Any], vocab_size: int) -> int:
    top_k = given.get("top_k")
    return min(vocab_size, integer("top_k", 0 if top_k == -1 else top_k, 0, 0, MOST_INT32))


def _stops(given: Mapping[str, Any], _: int) -> tuple[str, ...]:
    value = given.get("stop_strings")
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequest(f"stop_strings is {short(value)}; must be strings")
    if len(texts) > (most := FIELD_BY_NAME["stop"].max_entries):
        raise InvalidRequest(f"stop_strings has {len(texts)} strings; at most {most}")
    return tuple(texts)


def _banned(given: Mapping[str, Any], vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """`bad_words_ids`, and `suppress_tokens` as words of one token."""
    words, alone = given.get("bad_words_ids") or [], given.get("suppress_tokens") or []
    if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise InvalidRequest(f"bad_words_ids is {short(words)}; must be lists of token ids")
    if not isinstance(alone, list):
        raise InvalidRequest(f"suppress_tokens is {short(alone)}; must be a list of token ids")
    found: Sequence[Sequence[Any]] = [*words, *([token_id] for token_id in alone)]
    if len(found) > MAX_BANNED_WORDS:
        raise InvalidRequest(f"bad_words_ids and suppress_tokens have {len(found)} words; at most {MAX_BANNED_WORDS}")
    for word in found:
        for token_id in word:
            integer("a token id of bad_words_ids or suppress_tokens", token_id, -1, 0, vocab_size - 1)
            if token_id is None:
                raise InvalidRequest("bad_words_ids or suppress_tokens holds null; must be token ids")
    return tuple(dict.fromkeys(tuple(word) for word in found))


OWN_READERS: Mapping[str, Callable[[Mapping[str, Any], int], Any]] = {
    "top_k": _top_k,
    "stop": _stops,
    "bad_words": _banned,
}


def _is_one_of(value: Any, neutral: Sequence[Any]) -> bool:
    return not isinstance(value, StoredArray) and (value is False or value in neutral)


def _wrong(where: str, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(f"{where}: {name} is {short(value)}, {why}; {_REMEDY}")
