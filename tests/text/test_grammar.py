"""Grammars: what clients may write, what is refused and why, which bytes the masks allow. No model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from twostroke.core.errors import InvalidRequest
from twostroke.core.request import Grammar
from twostroke.text import grammar as grammar_file
from twostroke.text.grammar import GrammarCompiler, GrammarFailed, digest_of
from twostroke.text.grammar_program import MAX_DEPTH, MAX_REGEX_CHARS, grammar_of
from twostroke.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "model" / "bundled"
TOKENIZER = Tokenizer.load(BUNDLED)
VOCAB = TOKENIZER.vocab_size
EOS = TOKENIZER.eos_ids


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB, EOS)


def allowed(mask: bytes) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist())


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_equal_schemas_have_one_source_and_one_digest():
    schema = {"type": "object", "properties": {"ä": {"type": "null"}}}
    as_values, as_text = grammar_of({"json": schema}), grammar_of({"json": json.dumps(schema, indent=3)})
    assert as_values == as_text
    assert digest_of(as_values) == digest_of(as_text)
    assert digest_of(Grammar("regex", "a")) != digest_of(Grammar("grammar", "a"))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("x", "give an object"),
        ({}, "exactly one"),
        ({"json": {}, "regex": "a"}, "exactly one"),
        ({"poem": "x"}, "exactly one"),
        ({"regex": ""}, "not empty"),
        ({"regex": 3}, "give a text"),
        ({"regex": "a" * (MAX_REGEX_CHARS + 1)}, f"at most {MAX_REGEX_CHARS}"),
        ({"regex": "a\0"}, "a zero"),
        ({"grammar": "\ud800"}, "lone surrogate"),
        ({"json": "{"}, "not JSON"),
        ({"json": "[" * 50_000}, "not JSON"),
        ({"json": []}, "give an object"),
        ({"json": {"a": float("nan")}}, "not JSON"),
        ({"json": nested(MAX_DEPTH + 1)}, f"more than {MAX_DEPTH} levels"),
        ({"json": {"enum": list(range(20_001))}}, "more than 20000 values"),
        ({"choice": []}, "list of 1 to"),
        ({"choice": ["a", ""]}, r"choice\[1\]"),
        ({"choice": [3]}, r"choice\[0\]"),
        ({"structural_tag": []}, "give an object"),
    ],
)
def test_what_cannot_be_a_grammar_is_refused_with_its_reason(said: Any, why: str):
    with pytest.raises(InvalidRequest, match=why) as caught:
        grammar_of(said)
    assert caught.value.param == "structured_outputs"


TAG: dict[str, Any] = {"structures": [{"begin": "<f=a>", "schema": {}, "end": ""}], "triggers": ["<f="]}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(((a{100}){100}){100})"}, "too many expressions"),
        ({"regex": "[^a]*" * 1000}, "fuel"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "root ::= " + "(" * 20_000}, "recursion"),
        ({"json": {"type": "poem"}}, "poem"),
        ({"json": False}, "cannot be read"),
        ({"json": {"$ref": "#/$defs/none"}}, "none"),
        ({"json": {"$ref": "http://127.0.0.1:1/x.json"}}, "does not fetch"),
        ({"json": {"$ref": "file:///etc/hostname"}}, "does not fetch"),
        ({"json": {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}}, "refused"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"structural_tag": {}}, "structures and triggers"),
        ({"structural_tag": TAG | {"triggers": ["<g="]}}, "begin with one of the triggers"),
        ({"structural_tag": TAG | {"structures": [{"begin": "<f=a>", "schema": 3}]}}, r"structures\[0\]"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_with_its_reason(compiler, said: Any, why: str):
    with pytest.raises(InvalidRequest, match=why) as caught:
        compiler.check(grammar_of(said))
    assert caught.value.param == "structured_outputs"
    assert len(caught.value.message) < 500


def test_a_mask_allows_the_tokens_that_go_on_and_the_ends_where_the_text_may_end(compiler):
    matcher = compiler.start(grammar_of({"choice": ["ab", "abc"]}))
    a, b, c, ab = (TOKENIZER.backend.token_to_id(text) for text in ("a", "b", "c", "ab"))
    first = allowed(matcher.mask())
    assert {a, *([ab] if ab is not None else [])} <= first
    assert not first & set(EOS)
    matcher.advance([a, b])
    assert allowed(matcher.mask()) == {c, *EOS}
    matcher.advance([c])
    assert allowed(matcher.mask()) == set(EOS)


def test_a_token_that_is_not_allowed_fails_the_matcher_and_no_other(compiler):
    grammar = grammar_of({"choice": ["ab"]})
    broken, whole = compiler.start(grammar), compiler.start(grammar)
    with pytest.raises(GrammarFailed):
        broken.advance(TOKENIZER.encode("x", add_special_tokens=False))
    whole.advance(TOKENIZER.encode("a", add_special_tokens=False))
    assert allowed(whole.mask()) == {TOKENIZER.backend.token_to_id("b")}


def test_blanks_in_json_come_to_an_end(compiler):
    matcher = compiler.start(grammar_of({"json": {"type": "array", "items": {"type": "null"}}}))
    matcher.advance(TOKENIZER.encode("[", add_special_tokens=False))
    newline = TOKENIZER.backend.token_to_id("Ċ")
    assert newline in allowed(matcher.mask())
    matcher.advance([newline])
    assert newline not in allowed(matcher.mask())


def test_a_client_cannot_loosen_a_schema(compiler):
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        compiler.check(grammar_of({"json": schema}))


def test_a_vocabulary_larger_or_smaller_than_the_model_gives_masks_of_the_model(compiler):
    for vocab_size in (VOCAB - 96, VOCAB + 100):
        other = GrammarCompiler(TOKENIZER, vocab_size, EOS)
        mask = other.start(grammar_of({"regex": "[a-z]{3}"})).mask()
        assert len(mask) == (vocab_size + 31) // 32 * 4
        assert max(allowed(mask)) < min(VOCAB, vocab_size)


def test_a_model_without_an_end_takes_no_grammar():
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        GrammarCompiler(TOKENIZER, VOCAB, ()).start(Grammar("regex", "a"))


def test_the_cache_is_bounded_in_entries_and_characters(monkeypatch: pytest.MonkeyPatch):
    compiler = GrammarCompiler(TOKENIZER, VOCAB, EOS)
    monkeypatch.setattr(grammar_file, "MAX_CACHED", 3)
    for number in range(5):
        compiler.start(Grammar("regex", f"a{{{number + 1}}}"))
    assert compiler.num_cached == 3
    monkeypatch.setattr(grammar_file, "MAX_CACHED_CHARS", 100)
    compiler.start(Grammar("regex", "b" * 90))
    compiler.start(Grammar("regex", "c" * 90))
    assert compiler.num_cached == 1


def test_a_known_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch):
    compiler = GrammarCompiler(TOKENIZER, VOCAB, EOS)
    compiled: list[Grammar] = []
    make = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda grammar: compiled.append(grammar) or make(grammar))
    for _ in range(3):
        compiler.start(Grammar("regex", "abc"))
    assert len(compiled) == 1


def sentencepiece_tokenizer() -> Tokenizer:
    """A vocabulary of words with a mark for the space, and a token for each byte, as Llama 2 has it."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    model = tokenizers.models.BPE(
        {word: id_ for id_, word in enumerate(words)}, [("▁", "a"), ("a", "b"), ("▁a", "b")],
        unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    backend.decoder = tokenizers.decoders.Sequence(parts)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, ())


def test_byte_tokens_and_marked_spaces_are_known_by_their_bytes():
    tokenizer = sentencepiece_tokenizer()
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids).start(Grammar("regex", " ab|é"))
    named = {tokenizer.token(id_) for id_ in allowed(matcher.mask())}
    assert named == {"▁", "▁a", "▁ab", "<0x20>", "<0xC3>"}
    matcher.advance([tokenizer.backend.token_to_id("<0xC3>")])
    assert {tokenizer.token(id_) for id_ in allowed(matcher.mask())} == {"<0xA9>"}
    matcher.advance([tokenizer.backend.token_to_id("<0xA9>")])
    assert allowed(matcher.mask()) == set(tokenizer.eos_ids)
