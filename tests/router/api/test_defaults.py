"""What holds where a request says nothing: a checkpoint's own recommendation, read or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from twostroke.core.errors import CheckpointError, ContextLengthExceeded, InvalidRequest
from twostroke.core.request import USUAL_ANSWER_TOKENS, Request, SamplingParams
from twostroke.core.sampling import SamplingOptions
from twostroke.router.api import defaults
from twostroke.router.api.call import GenerateCall
from twostroke.router.api.defaults import NO_DEFAULTS, SamplingDefaults, described
from twostroke.router.api.models import ModelDirectory, ServedModel
from twostroke.router.api.sampling import sampling_of
from twostroke.router.api.validate import Limits, validate
from twostroke.router.keys.grants import KeyRing
from twostroke.router.routing.facts import ModelFacts
from twostroke.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[3] / "model" / "bundled"
VOCAB = 4096
LIMITS = Limits(8, None, 3600.0, KeyRing())
GIVEN = {
    "eos_token_id": [1],
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.5,
    "max_new_tokens": 40,
    "min_new_tokens": 3,
    "stop_strings": ["###"],
    "bad_words_ids": [[7], [8, 9]],
    "suppress_tokens": [10],
    "length_penalty": 1.0,
    "num_beams": 1,
    "typical_p": 1.0,
    "guidance_scale": None,
    "transformers_version": "5.0.0",
}


def load(directory: Path, **fields: Any) -> SamplingDefaults:
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return SamplingDefaults.load(directory, VOCAB)


def test_reads_what_a_request_could_say(tmp_path: Path) -> None:
    found = load(tmp_path, **GIVEN)
    assert found == SamplingDefaults(0.6, 0.95, 20, 0.05, 1.5, 40, 3, ("###",), ((7,), (8, 9), (10,)))
    assert found.told["top_k"] == 20
    assert "temperature 0.6, top_p 0.95" in described(found)


def test_says_nothing_where_nothing_is_recommended(tmp_path: Path) -> None:
    assert SamplingDefaults.load(tmp_path, VOCAB) == NO_DEFAULTS
    assert load(tmp_path, eos_token_id=[1], do_sample=None, top_k=None) == NO_DEFAULTS
    assert NO_DEFAULTS.told == {}
    assert described(NO_DEFAULTS) == ""
    assert SamplingDefaults.load(BUNDLED, VOCAB) == NO_DEFAULTS


def test_null_and_false_say_nothing_of_what_is_not_served(tmp_path: Path) -> None:
    assert load(tmp_path, **dict.fromkeys([*defaults._NOT_SERVED, *GIVEN])) == NO_DEFAULTS
    assert load(tmp_path, **dict.fromkeys(defaults._NOT_SERVED, False)) == NO_DEFAULTS
    for name, neutral in defaults._NOT_SERVED.items():
        for value in neutral:
            assert load(tmp_path, **{name: value}) == NO_DEFAULTS, name


def test_a_seed_is_64_bits_with_a_sign_or_without() -> None:
    for seed, meant in ((-1, 2**64 - 1), (2**64 - 1, 2**64 - 1), (-(2**63), 2**63), (0, 0), (7, 7)):
        assert _seed(seed) == meant
    assert _seed(None) != _seed(None)


def test_bad_words_are_bounded_in_tokens() -> None:
    tokenizer = Tokenizer.load(BUNDLED)
    model = ServedModel("m", 100, VOCAB, tokenizer, None, None)  # type: ignore[arg-type]
    words = [f"{n:03} of the words that are not wanted" for n in range(128)]
    assert len(sampling_of(GenerateCall(prompt=[1], sampling={"bad_words": words}), model, (1,), None).bad_words) >= 128
    with pytest.raises(InvalidRequest, match="more than 8192 tokens") as caught:
        sampling_of(GenerateCall(prompt=[1], sampling={"bad_words": ["\U0001f600" * 256] * 9}), model, (1,), None)
    assert caught.value.param == "bad_words"


def _seed(seed: int | None) -> int:
    model = ServedModel("m", 100, VOCAB, None, None, None)  # type: ignore[arg-type]
    said: SamplingOptions = {} if seed is None else {"seed": seed}
    return sampling_of(GenerateCall(prompt=[1], sampling=said), model, (1,), None).seed


def test_no_sampling_means_greedy(tmp_path: Path) -> None:
    found = load(tmp_path, do_sample=False, temperature=0.7, repetition_penalty=1.1)
    assert (found.temperature, found.repetition_penalty) == (0.0, 1.1)


def test_a_filter_that_is_off_is_off(tmp_path: Path) -> None:
    assert load(tmp_path, top_k=-1).top_k == load(tmp_path, top_k=0).top_k == 0
    assert load(tmp_path, top_k=10 * VOCAB).top_k == VOCAB


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"do_sample": "no"}, "do_sample is 'no'"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": ["a"] * 17}, "17 strings; at most 16"),
        ({"bad_words_ids": [7]}, "bad_words_ids"),
        ({"bad_words_ids": [[VOCAB]]}, "token id of bad_words_ids"),
        ({"suppress_tokens": [None]}, "null"),
        ({"suppress_tokens": list(range(1025))}, "1025 words; at most 1024"),
        ({"num_beams": 4}, "num_beams is 4, which is not served"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"sequence_bias": [[[5], -1.0]]}, "sequence_bias"),
        ({"forced_eos_token_id": 1}, "forced_eos_token_id"),
    ],
)
def test_refuses_by_name_what_has_no_meaning_or_is_not_served(
    fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, **fields)
    assert named in str(caught.value)
    assert "generation_config.json" in str(caught.value)
    assert "model.generation_config: none" in str(caught.value)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config.json: is no JSON"):
        SamplingDefaults.load(tmp_path, VOCAB)


# ------------------------------------------------------------------ GGUF


def gguf(path: Path, **sampling: Any) -> SamplingDefaults:
    writer = GGUFWriter(path, "llama")
    for name, value in sampling.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_int32)(f"general.sampling.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return SamplingDefaults.load(path, VOCAB)


def test_reads_what_a_gguf_file_recommends(tmp_path: Path) -> None:
    found = gguf(tmp_path / "m.gguf", temp=0.7, top_k=20, top_p=0.95, min_p=0.05, penalty_repeat=1.05)
    assert found == SamplingDefaults(0.7, 0.95, 20, 0.05, 1.05)
    assert gguf(tmp_path / "m.gguf", penalty_repeat=1.05, penalty_last_n=0) == NO_DEFAULTS
    with pytest.raises(CheckpointError, match="penalty_last_n is 64"):
        gguf(tmp_path / "m.gguf", penalty_repeat=1.05, penalty_last_n=64)
    with pytest.raises(CheckpointError, match="mirostat is 2"):
        gguf(tmp_path / "m.gguf", mirostat=2)


# ------------------------------------------------------------------ in a request


class Offers:
    def __init__(self, path: Path) -> None:
        self._facts = ModelFacts("m", b"f", b"n", "", 1024, VOCAB, True, str(path), 1)

    def models(self) -> list[ModelFacts]:
        return [self._facts]


async def served(directory: Path, *, reads_defaults: bool = True, **fields: Any) -> ServedModel:
    path = Path(shutil.copytree(BUNDLED, directory / "m", dirs_exist_ok=True))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | fields))
    return await ModelDirectory(Offers(path), reads_defaults=reads_defaults).get("m")


async def test_holds_where_a_request_says_nothing_and_yields_where_it_speaks(tmp_path: Path) -> None:
    model = await served(tmp_path, **GIVEN)
    silent = validate(GenerateCall(prompt="hi"), model, LIMITS)
    found = silent.sampling
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.6, 20, 0.95, 0.05)
    assert (found.repetition_penalty, found.max_tokens, found.min_tokens) == (1.5, 40, 3)
    assert (found.stop, found.bad_words) == (("###",), ((7,), (8, 9), (10,)))
    nothing: SamplingOptions = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    neutral = GenerateCall(prompt="hi", sampling={**nothing, "max_tokens": 2})
    spoken = validate(neutral, model, LIMITS).sampling
    assert (spoken.temperature, spoken.top_k, spoken.top_p, spoken.min_p) == (1.0, 0, 1.0, 0.0)
    assert (spoken.repetition_penalty, spoken.max_tokens, spoken.min_tokens) == (1.0, 2, 2)
    some = GenerateCall(prompt="hi", sampling={"top_k": -1, "stop": ["x"], "min_tokens": 0})
    assert validate(some, model, LIMITS).sampling.stop == ("x",)
    off = await served(tmp_path, reads_defaults=False, **GIVEN)
    assert validate(GenerateCall(prompt="hi"), off, LIMITS).sampling.temperature == 1.0


async def test_a_chat_runs_until_it_ends_or_the_context_is_full(tmp_path: Path) -> None:
    model, chat = await served(tmp_path), GenerateCall(messages=[{"role": "user", "content": "hi"}])
    request = validate(chat, model, LIMITS)
    assert request.sampling.max_tokens == 1024 - len(request.prompt_ids)
    assert not request.is_bounded
    capped = validate(chat, model, Limits(8, 50, 3600.0, KeyRing()))
    assert (capped.sampling.max_tokens, capped.is_bounded) == (50, True)
    completion = validate(GenerateCall(prompt="hi", usual_max_tokens=16), model, LIMITS)
    assert (completion.sampling.max_tokens, completion.is_bounded) == (16, True)
    with pytest.raises(ContextLengthExceeded):
        validate(GenerateCall(prompt="hi", sampling={"max_tokens": 1024}), model, LIMITS)


def test_an_answer_without_a_bound_counts_as_a_usual_one() -> None:
    params = SamplingParams(max_tokens=128_000)
    open_ended = Request("r", "m", (1, 2), params, 1, "public", 60.0, is_bounded=False)
    assert open_ended.expected_tokens == USUAL_ANSWER_TOKENS
    assert Request("r", "m", (1, 2), params, 1, "public", 60.0).expected_tokens == 128_000
    assert Request("r", "m", (1,), SamplingParams(9), 1, "public", 60.0, is_bounded=False).expected_tokens == 9
