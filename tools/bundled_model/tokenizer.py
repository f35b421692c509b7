"""The bundled model's byte-level BPE tokenizer and its chat template. Knows no model.

Source: byte-level BPE as in GPT-2 (Radford et al. 2019), trained with the `tokenizers` library.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .conversations import Message
from .corpus import Document

VOCAB_SIZE = 4_096
CONTEXT_TOKENS = 4_096

BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, END = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL_TOKENS = (BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, END)
"""In the order of their ids, which are 0 to 6."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' or message.role == 'developer' -%}
{{- '<|system|>' + message.content + '<|end|>' -}}
{%- elif message.role == 'user' -%}
{{- '<|user|>' + message.content + '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' + message.content + '<|end|>' -}}
{%- else -%}
{{- raise_exception('this model knows the roles system, developer, user and assistant; got ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from `texts`. Any UTF-8 text survives encoding and decoding; encoding prepends BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, special_id(tokenizer, BOS))]
    )
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token; every tokenizer trained here has it."""
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return int(number)


def render(messages: Sequence[Message]) -> str:
    """Text of a finished conversation, equal to that of `CHAT_TEMPLATE` without a generation prompt."""
    return BOS + "".join(f"<|{role}|>{content}{END}" for role, content in messages)


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[npt.NDArray[np.int64]]:
    """Encode each document to an array of token ids: BOS first, EOS last."""
    texts = [render(document.messages) if document.messages else BOS + document.text for document in documents]
    eos = special_id(tokenizer, EOS)
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array([*encoding.ids, eos], dtype=np.int64) for encoding in encodings]


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json in Hugging Face's format."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
