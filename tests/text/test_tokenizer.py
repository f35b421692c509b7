"""Loading, encoding and decoding, with transformers as the oracle; broken files end in errors that name them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from twostroke.core.errors import CheckpointError, InvalidRequest
from twostroke.text.tokenizer import Tokenizer

TEXTS = ["", " ", "def f(x):\n    return x", "naïve 日本語 👩‍👩‍👧", "<s>bos within</s>", "a\u0000b", "x" * 500]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["def f(x):\n    return x + 1"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)  # some checkpoints ship this; a prompt must never be cut in silence
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "clean_up_tokenization_spaces": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return tmp_path


def test_encodes_and_decodes_as_transformers_does(directory):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_neither_truncates_nor_pads(directory):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.encode("x" * 500)) == "x" * 500


def test_knows_where_texts_begin_and_end(directory):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.bos_id == 0
    assert tokenizer.eos_id == 1
    assert tokenizer.eos_ids == (1, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.token(tokenizer.vocab_size - 1) is not None
    assert tokenizer.token(tokenizer.vocab_size) is None


def test_answers_of_gpt_oss_end_with_a_call_although_no_file_says_so(directory):
    path, before = str(directory / "tokenizer.json"), (directory / "tokenizer.json").read_text()
    backend = tokenizers.Tokenizer.from_str(before)
    backend.add_tokens(["<|return|>", "<|call|>"])  # words, that an answer may hold
    backend.save(path)
    assert Tokenizer.load(directory).eos_ids == (1, 2)
    backend = tokenizers.Tokenizer.from_str(before)
    backend.add_special_tokens(["<|return|>"])
    backend.save(path)
    assert Tokenizer.load(directory).eos_ids == (1, 2)  # one alone is no format
    backend.add_special_tokens(["<|call|>"])
    backend.save(path)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.eos_ids == (1, 2, backend.token_to_id("<|return|>"), backend.token_to_id("<|call|>"))


def test_a_tokenizer_json_alone_is_enough(directory):
    (directory / "tokenizer_config.json").unlink()
    (directory / "generation_config.json").unlink()
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == ()


def test_older_checkpoints_name_their_special_tokens_elsewhere(directory):
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    assert Tokenizer.load(directory).bos_id == 0


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json: is missing"),
        ("tokenizer.json", b"{", "tokenizer.json: is no tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: cannot be read"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: is no JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: holds a JSON list"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "tokenizer_config.json: bos_token is 3"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: is no JSON"),
        ("generation_config.json", b'{"eos_token_id": "2"}', "generation_config.json: eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": 99999}', "id 99999 is not in"),
    ],
)
def test_a_broken_file_is_named(directory, name, content, says):
    (directory / name).unlink() if content is None else (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        Tokenizer.load(directory)
    assert str(directory) in str(caught.value)


def test_text_that_is_no_unicode_is_the_clients_fault(directory):
    with pytest.raises(InvalidRequest, match="prompt is no valid Unicode") as caught:
        Tokenizer.load(directory).encode("ab\ud800")
    assert caught.value.param == "prompt"


def test_threads_share_one_tokenizer(directory):
    tokenizer = Tokenizer.load(directory)
    texts = [f"{text}{place}" for place in range(40) for text in TEXTS]
    alone = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(tokenizer.encode, texts)) == alone
        assert list(threads.map(tokenizer.decode, alone)) == [tokenizer.decode(ids) for ids in alone]
