"""Tokenizers of every kind whose texts grow, trained here, and the bundled model's."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from twostroke.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[3] / "model" / "bundled"
CORPUS = [
    "def add(a, b):\n    return a + b  # naïve façade",
    "Die Größe des Würfels beträgt drei Meter, nicht vier.",
    "日本語の文章も少し。 and an emoji 👩‍👩‍👧 here",
    "the quick brown fox  jumps over   the lazy dog " * 3,
]


@cache
def byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["größer als", "→"])  # not special, and not in the byte disguise
    return Tokenizer(backend, {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}, ())


def _sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    """A unigram vocabulary with metaspace and byte tokens, as Llama 2's and Gemma's have."""
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>"))
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    vocab += [(piece, score) for piece, score in pieces if piece != "<unk>"]
    backend = tokenizers.Tokenizer(models.Unigram([tuple(entry) for entry in vocab], 0, True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, ())


@cache
def llama_style() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _sentencepiece(decoders.Sequence(steps))


@cache
def gemma_style() -> Tokenizer:
    return _sentencepiece(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


@cache
def metaspace() -> Tokenizer:
    return _sentencepiece(decoders.Metaspace())


@cache
def bundled() -> Tokenizer:
    return Tokenizer.load(BUNDLED)


def _of_words(decoder: decoders.Decoder | None, *words: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>", "<unk>"])
    return Tokenizer(backend, {"bos_token": "<s>"}, ())


@cache
def word_piece() -> Tokenizer:
    return _of_words(decoders.WordPiece(), "<unk>", "<s>", "a", "##b", "go", "##ing", ".", "'", "s", "##€")


@cache
def word_ends() -> Tokenizer:
    return _of_words(decoders.BPEDecoder(), "<unk>", "<s>", "a</w>", "b", "go", "ing</w>", ".</w>", "€</w>")


@cache
def words_apart() -> Tokenizer:
    return _of_words(None, "<unk>", "<s>", "a", "b", "go", "€")


MAKERS = [byte_level, llama_style, gemma_style, metaspace, word_piece, word_ends, words_apart]
if (BUNDLED / "tokenizer.json").exists():
    MAKERS.append(bundled)
each_tokenizer = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def lengths_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every decoding from now on: how many ids it took."""
    lengths: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        lengths.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    return lengths
