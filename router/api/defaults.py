"""Sampling defaults of a checkpoint, for fields that a request does not give. Knows files and fields, no request.

From generation_config.json, or a GGUF file's `general.sampling.*`. Settings that would change the answer and are not
served are refused by name. Source: transformers' GenerationConfig; llama.cpp's model-embedded sampling parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.gguf.file import GgufFile, StoredArray, is_gguf
from ...core.errors import CheckpointError, InvalidRequest
from ...text.files import read_json
from .checks import integer, number, short

MAX_TEMPERATURE = 100.0
LEAST_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0
LEAST_TOP_P = 1e-6
MAX_BANNED_WORDS = 1024
MAX_STOPS = 16

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
_GGUF_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Default values of `SamplingParams`."""

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
    top_k = given.get("top_k")
    try:
        found = SamplingDefaults(
            temperature=number("temperature", given.get("temperature"), 1.0, 0.0, MAX_TEMPERATURE),
            top_p=number("top_p", given.get("top_p"), 1.0, LEAST_TOP_P, 1.0),
            top_k=min(vocab_size, integer("top_k", 0 if top_k == -1 else top_k, 0, 0, 2**31 - 1)),
            min_p=number("min_p", given.get("min_p"), 0.0, 0.0, 1.0),
            repetition_penalty=number(
                "repetition_penalty",
                given.get("repetition_penalty"),
                1.0,
                LEAST_REPETITION_PENALTY,
                MAX_REPETITION_PENALTY,
            ),
            max_tokens=integer("max_new_tokens", given.get("max_new_tokens"), 0, 1, 2**31 - 1) or None,
            min_tokens=integer("min_new_tokens", given.get("min_new_tokens"), 0, 0, 2**31 - 1),
            stop=_stops(given.get("stop_strings")),
            bad_words=_banned(given, vocab_size),
        )
    except InvalidRequest as error:
        raise CheckpointError(f"{where}: {error.message}; {_REMEDY}") from None
    if given.get("do_sample", True) is True:
        return found
    if given["do_sample"] is not False:
        raise _wrong(where, "do_sample", given["do_sample"], "and must be true or false")
    return SamplingDefaults(**{**{f: getattr(found, f) for f in found.__slots__}, "temperature": 0.0})


def _stops(given: Any) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequest(f"stop_strings is {short(given)}; must be strings")
    if len(texts) > MAX_STOPS:
        raise InvalidRequest(f"stop_strings has {len(texts)} strings; at most {MAX_STOPS}")
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


def _is_one_of(value: Any, neutral: Sequence[Any]) -> bool:
    return not isinstance(value, StoredArray) and (value is False or value in neutral)


def _wrong(where: str, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(f"{where}: {name} is {short(value)}, {why}; {_REMEDY}")
