"""Model card, filled with the figures of the training run and its evaluation. Measures nothing itself."""

from pathlib import Path
from typing import Any

_CARD = """\
---
language: en
license: apache-2.0
library_name: transformers
tags: [llama, python, from-scratch]
---

# Twostroke's bundled model

A language model of {parameters:.1f} million parameters, trained from scratch on the text that comes with every
Python. It is here so that a cluster has something real to serve after `git clone`, without a download. It is no
assistant: its Python looks like Python and its answers sound like docstrings; neither should be believed.

| | |
|---|---|
| architecture | `LlamaForCausalLM` with grouped-query attention, embeddings tied |
| sizes | hidden 256, 6 layers, 4 heads of 64, 2 key-value heads, FFN 768 |
| weights | bfloat16, {size:.1f} MiB |
| tokenizer | byte-level BPE, 4,096 tokens; any UTF-8 text survives it unchanged |
| context | 4,096 tokens, trained on sequences of 512 to 4,096 |
| frame | `<\\|bos\\|>` and `<\\|eos\\|>` around a document, `<\\|pad\\|>` |
| turns | `<\\|system\\|>`, `<\\|user\\|>`, `<\\|assistant\\|>`, each closed by `<\\|end\\|>` |

Generation stops at `<|end|>` and at `<|eos|>`.

## Data

The standard library of Python {python}, as installed: its modules' sources, without tests, generated character tables
and bundled packages; the topics of `help()` (`pydoc_data.topics`); and conversations made from both by rule: a
question, and the docstring, signature, source or help text that answers it. {train_documents:,} training documents,
{train_tokens:,} tokens. The text is under the Python Software Foundation License, Version 2; the weights and the
scripts are under Apache-2.0, as this repository.

One file in twenty, chosen by the hash of its path, is held out ({held_out_documents} files and topics,
{held_out_tokens:,} tokens), together with every conversation made from it ({held_out_conversations} conversations,
{held_out_conversation_tokens:,} tokens). The tokenizer, too, was learned from the training part only. Files of one
library resemble each other, and some functions have near copies elsewhere in it: the figures say how well the model
knows this library's style, nothing beyond.

## Training

```
{command}
```

{steps:,} steps of 8,192 tokens, {tokens_seen:,} tokens in all (about {epochs:.1f} epochs), on {machine}, shared with
other work; torch {torch}. Muon for the layers' matrices, AdamW for embeddings and norms, bfloat16 autocast. Rates and
sequence lengths follow the wall clock, so a quieter or busier machine gives another model.{interruptions}
`python -m bundled_model.evaluate DIR` measured what follows and wrote this card.

## Held-out perplexity

Per token: same tokenizer, same tokens, same training documents. The model reads windows of {window_tokens:,} tokens
that move by {stride_tokens:,}; the n-gram reads the four tokens before each. Weights rounded to bfloat16, arithmetic
in float32.

| | sources and help topics | conversations |
|---|---|---|
| interpolated Kneser–Ney 5-gram | {kneser_ney_5gram:.2f} | {conversations_kneser_ney_5gram:.2f} |
| the same, modified discounts | {modified_kneser_ney_5gram:.2f} | {conversations_modified_kneser_ney_5gram:.2f} |
| **this model** | **{model:.2f}** | **{conversations_model:.2f}** |

Most of the lead comes from what a file has said before, which the n-gram cannot see: over the first 64 tokens of each
held-out source or topic the 5-gram has {beginnings_kneser_ney_5gram:.2f} and the model {beginnings_model:.2f}.

In {num_chats} greedy chats of three turns {replies_ended} of {replies} replies end with `<|end|>` within
{longest_reply_tokens} tokens.

## Limits

It knows forms, not facts: names, signatures and explanations are often invented, and code that it writes seldom runs.
English and Python only; other text is encoded without loss and continued without sense. Greedy text of some length
tends to repeat itself. It has had no safety training. Use it to try the serving, not for answers.
"""


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write MODEL_CARD.md from the contents of training.json."""
    run, corpus = facts["run"], facts["corpus"]
    values = run | corpus | facts["held_out_perplexity"] | facts["evaluation"] | facts["chat"] | facts["versions"]
    resumed = ", ".join(f"{one['step']:,} (begun as {one['minutes_before']:g} minutes)" for one in run["resumed"])
    values |= {
        "interruptions": f"\nContinued from a kept state at step {resumed}." if resumed else "",
        "command": facts["command"],
        "machine": facts["machine"],
        "parameters": run["parameters"] / 1e6,
        "epochs": run["tokens_seen"] / corpus["train_tokens"],
        "size": (folder / "model.safetensors").stat().st_size / 2**20,
    }
    (folder / "MODEL_CARD.md").write_text(_CARD.format(**values), encoding="utf-8")
