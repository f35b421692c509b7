"""Vocabularies out of GGUF files: a trained BPE against transformers, SentencePiece's rule, and real models' own."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from support.checkpoints.real_models import VOCABULARIES, real_models

from twostroke.checkpoint.gguf.file import GgufFile
from twostroke.checkpoint.gguf.special_ids import end_ids
from twostroke.core.errors import CheckpointError
from twostroke.text.incremental import IncrementalText
from twostroke.text.templates.template import ChatTemplate
from twostroke.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[2] / "model" / "bundled"
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
ODD = [
    "",
    " ",
    "  leading and   inner spaces ",
    "tabs\tand\nnew\n\n\nlines\r\n",
    "don't you'LL we'Ve I'd",
    "12345 3.14159 1,000,000 ²³½",
    "naïve cafe\u0301 Ünïcödé ﬁ",
    "日本語テキスト、そして한국어 и кириллица",
    "👩‍👩‍👧‍👦 🇨🇭 🏳️‍🌈 emoji",
    "def f(x):\n    return x**2  # code\n",
    "\u0000\u0007\u200b\ufeff\U0010ffff",
    "a" * 70 + "!?…—«»",
    "<|im_start|>user<|im_end|> <s>not</s> <unk>",
]


def write(path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# ---------------------------------------------------------------- byte-level BPE


def bundled_metadata(**more: Any) -> dict[str, Any]:
    """The bundled model's tokenizer.json in GGUF's keys."""
    backend = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    merges = json.loads(backend.to_str())["model"]["merges"]
    special = backend.get_added_tokens_decoder()
    ids = range(backend.get_vocab_size())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [backend.id_to_token(i) for i in ids],
        "tokenizer.ggml.token_type": [CONTROL if i in special else NORMAL for i in ids],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **more,
    }


def test_a_trained_bpe_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(BUNDLED)
    ours = Tokenizer.load(write(tmp_path / "m.gguf", bundled_metadata()))
    specials = "".join(theirs.all_special_tokens)
    for text in [*ODD, specials, f"{specials} a {specials}b"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        grown = IncrementalText(ours)
        assert "".join([*(grown.push([i]) for i in ids), grown.flush()]) == ours.decode(ids)
    assert ours.special_tokens == {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
    assert (ours.bos_id, ours.eos_id) == (0, 1)


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        ({}, []),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [0]),
        ({"tokenizer.ggml.add_bos_token": True}, [0]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, []),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [0, 1]),
    ],
)
def test_the_file_says_what_stands_around_a_text(tmp_path: Path, asked: dict[str, Any], ids: list[int]) -> None:
    ours = Tokenizer.load(write(tmp_path / "m.gguf", bundled_metadata(**asked)))
    plain = ours.encode("some text", add_special_tokens=False)
    assert ours.encode("some text") == [*ids[:1], *plain, *ids[1:]]


def test_some_families_compose_their_text_first(tmp_path: Path) -> None:
    plain = Tokenizer.load(write(tmp_path / "a.gguf", bundled_metadata()))
    composing = Tokenizer.load(write(tmp_path / "b.gguf", bundled_metadata(**{"tokenizer.ggml.pre": "qwen2"})))
    assert plain.encode("cafe\u0301") != plain.encode("caf\u00e9")
    assert composing.encode("cafe\u0301") == composing.encode("caf\u00e9")


def test_chats_end_where_the_vocabulary_has_an_end_of_turn(tmp_path: Path) -> None:
    metadata = bundled_metadata()
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens[4000], kinds[4000] = "<|eot_id|>", CONTROL
    tokens[4001] = "<|im_end|>"  # of no special kind: text
    file = GgufFile(write(tmp_path / "m.gguf", {**metadata, "tokenizer.ggml.eom_token_id": 7}))
    assert end_ids(file) == (1, 7, tokens.index("<|end|>"), 4000)


def test_answers_of_gpt_oss_end_with_a_call_too_and_not_with_a_message(tmp_path: Path) -> None:
    metadata = bundled_metadata()
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert "<|end|>" in tokens
    tokens[4000], kinds[4000] = "<|return|>", CONTROL
    tokens[4001], kinds[4001] = "<|call|>", CONTROL
    assert end_ids(GgufFile(write(tmp_path / "m.gguf", metadata))) == (1, 4000, 4001)


def test_words_of_gpt_4o_are_cut_as_its_pattern_says(tmp_path: Path) -> None:
    metadata = bundled_metadata(**{"tokenizer.ggml.pre": "gpt-4o"})
    (cut,) = (Tokenizer.load(write(tmp_path / "m.gguf", metadata)).backend.pre_tokenizer,)
    words = [word for word, _ in cut.pre_tokenize_str("HelloWorld isn't 12345 x/\n\nÄrger")]
    assert words == ["Hello", "World", "Ġisn't", "Ġ", "123", "45", "Ġx", "/ĊĊ", "ÃĦrger"]


def test_templates_by_name_with_the_files_own_tokens(tmp_path: Path) -> None:
    templates = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "{{ tools[0].name }}{{ eos_token }}",
    }
    path = write(tmp_path / "m.gguf", bundled_metadata(**templates))
    template, ours = ChatTemplate.load(path), Tokenizer.load(path)
    assert template is not None
    chat = [{"role": "user", "content": "hi"}]
    assert template.render(chat) == f"{ours.token(0)}hi"
    assert template.render(chat, tools=[{"name": "hammer"}]) == f"hammer{ours.token(1)}"
    assert ChatTemplate.load(write(tmp_path / "base.gguf", bundled_metadata())) is None


# ---------------------------------------------------------------- SentencePiece by scores


def spm_metadata(**more: Any) -> dict[str, Any]:
    """A vocabulary whose merges by pair and by score differ: scores are drawn, and pieces overlap."""
    generator = random.Random(4)
    special = ["<unk>", "<s>", "</s>", "<|user|>", "\n\n"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = list("▁abcdeé日")
    words = list(dict.fromkeys("".join(generator.choices("▁abcde", k=generator.randint(2, 4))) for _ in range(150)))
    kinds = [UNKNOWN, CONTROL, CONTROL, CONTROL, USER] + [BYTE] * 256 + [NORMAL] * (len(letters) + len(words))
    scores = [0.0] * 261 + [-1e4] * len(letters) + [-float(n) for n in generator.sample(range(1, 999), len(words))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *bytes_, *letters, *words],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


def by_definition(metadata: dict[str, Any], text: str, *, prefixed: bool) -> list[int]:
    """SentencePiece's BPE: join the neighbours whose whole has the best score, the leftmost first.

    Source: Kudo and Richardson 2018, and what files of this kind mean.
    """
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    score = {t: s for t, s, k in zip(tokens, scores, metadata["tokenizer.ggml.token_type"], strict=True) if k == NORMAL}
    symbols = list((" " + text if prefixed and text else text).replace(" ", "▁"))
    while True:
        joined = [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in score]
        if not joined:
            break
        at = -max(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    place = {token: i for i, token in enumerate(tokens)}
    known = [[place[s]] if s in score else [place[f"<0x{b:02X}>"] for b in s.encode()] for s in symbols]
    return [id_ for ids in known for id_ in ids]


@pytest.mark.parametrize("prefixed", [True, False])
def test_scores_merge_as_sentencepiece_does(tmp_path: Path, prefixed: bool) -> None:
    more = {} if prefixed else {"tokenizer.ggml.add_space_prefix": False}
    metadata = spm_metadata(**more)
    ours = Tokenizer.load(write(tmp_path / "m.gguf", metadata))
    generator = random.Random(9)
    texts = ["".join(generator.choices("  abcdeé日x\n👩", k=generator.randint(0, 40))) for _ in range(300)]
    for text in [*ODD[:-1], *texts]:
        if "\n\n" in text:
            continue
        ids = by_definition(metadata, text, prefixed=prefixed)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == text
        grown = IncrementalText(ours)
        assert "".join([*(grown.push([i]) for i in ids), grown.flush()]) == text
    # Tokens written out stand for themselves; what follows one begins anew.
    pieces = [by_definition(metadata, part, prefixed=prefixed) for part in ("ab", "cd", "e")]
    assert ours.encode("ab<|user|>cd\n\ne", add_special_tokens=False) == [*pieces[0], 3, *pieces[1], 4, *pieces[2]]
    assert 3 in ours.special_ids
    assert 4 not in ours.special_ids


@pytest.mark.parametrize("kind", [UNKNOWN, NORMAL])
def test_the_unknown_token_gives_no_text(tmp_path: Path, kind: int) -> None:
    """Its kind says so, or else its name does."""
    metadata = spm_metadata()
    metadata["tokenizer.ggml.token_type"][0] = kind
    if kind == UNKNOWN:
        del metadata["tokenizer.ggml.unknown_token_id"]
    ours = Tokenizer.load(write(tmp_path / "m.gguf", metadata))
    letter = metadata["tokenizer.ggml.tokens"].index("b")
    assert ours.decode([letter, 0, letter]) == "bb"
    assert ours.decode([0, 0], skip_special_tokens=False) == "<unk><unk>"
    assert IncrementalText(ours).push([letter, 0]) == "b"


def test_a_byte_level_vocabulary_has_no_unknown_token(tmp_path: Path) -> None:
    """Some files name just any."""
    ours = Tokenizer.load(write(tmp_path / "m.gguf", bundled_metadata(**{"tokenizer.ggml.unknown_token_id": 70})))
    assert ours.decode([70]) != ""


# ---------------------------------------------------------------- real ones


@pytest.mark.timeout(240)  # the first one fetches 77 MB
@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies_give_the_ids_that_transformers_gave(name: str) -> None:
    path = real_models() / f"ggml-vocab-{name}.gguf"
    ours = Tokenizer.load(path)
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = path.with_name(path.name + ".out").read_text().split("\n")[: len(texts)]
    assert len(texts) > 40
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text, add_special_tokens=False) == [int(id_) for id_ in ids.split()], text


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer.ggml.model is 't5'; served: gpt2, llama"),
        ({"tokenizer.ggml.model": "bert"}, r"'bert'; served"),
        ({"tokenizer.ggml.model": "rwkv"}, r"'rwkv'; served"),
        ({"tokenizer.ggml.pre": "viking"}, r"tokenizer.ggml.pre is 'viking'; served: default, gpt-2"),
        ({"tokenizer.ggml.merges": ["nothing nowhere"]}, "merges do not fit"),
        ({"tokenizer.ggml.merges": []}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 tokenizer.ggml.token_type for 4096 tokens"),
        ({"tokenizer.ggml.bos_token_id": 4096}, "bos_token_id is 4096; must be below 4096"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.model": "llama"}, "0 tokenizer.ggml.scores for 4096 tokens"),
    ],
)
def test_a_vocabulary_that_is_not_served_is_refused_by_name(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    metadata = {key: value for key, value in bundled_metadata(**more).items() if value != []}
    with pytest.raises(CheckpointError, match=words) as caught:
        Tokenizer.load(write(tmp_path / "m.gguf", metadata))
    assert "m.gguf" in caught.value.message
