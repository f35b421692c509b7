"""Held-out documents as token ids, and their perplexity under the n-gram baseline. Knows no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .corpus import Document, collect
from .ngram import Ids, KneserNey, perplexity
from .tokenizer import VOCAB_SIZE, encode_documents


@dataclass(frozen=True, slots=True)
class Split:
    """The corpus as token ids, one array per document."""

    train: list[npt.NDArray[np.int64]]
    held_out_text: list[npt.NDArray[np.int64]]  # sources and help topics
    held_out_conversations: list[npt.NDArray[np.int64]]


BEGINNING_TOKENS = 64


def beginnings(documents: Sequence[Ids]) -> list[Ids]:
    """First tokens of each document, where no model has a long context yet."""
    return [document[: BEGINNING_TOKENS + 1] for document in documents]


def load_split(folder: Path) -> Split:
    """Collect this machine's corpus and encode it with the tokenizer in `folder`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = collect()

    def encode(chosen: Sequence[Document]) -> list[npt.NDArray[np.int64]]:
        return encode_documents(tokenizer, chosen)

    return Split(
        train=encode([d for d in documents if not d.held_out]),
        held_out_text=encode([d for d in documents if d.held_out and d.kind != "conversation"]),
        held_out_conversations=encode([d for d in documents if d.held_out and d.kind == "conversation"]),
    )


def ngram_figures(split: Split, order: int = 5) -> dict[str, float]:
    """Held-out perplexities of the baselines, which are counted on the network's training documents."""
    plain = KneserNey(split.train, VOCAB_SIZE, order=order)
    modified = KneserNey(split.train, VOCAB_SIZE, order=order, modified=True)
    return {
        "kneser_ney_5gram": round(perplexity(plain, split.held_out_text), 3),
        "modified_kneser_ney_5gram": round(perplexity(modified, split.held_out_text), 3),
        "beginnings_kneser_ney_5gram": round(perplexity(plain, beginnings(split.held_out_text)), 3),
        "conversations_kneser_ney_5gram": round(perplexity(plain, split.held_out_conversations), 3),
        "conversations_modified_kneser_ney_5gram": round(perplexity(modified, split.held_out_conversations), 3),
    }
