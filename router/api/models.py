"""Tokenizer, template and limits of each served model, loaded once, at the first use."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ...core.errors import ModelNotFound, Unavailable
from ...text.parsing.parsers import NO_PARSERS, NONE, OWN_PARSERS, Parsers, parsers_of
from ...text.templates.template import ChatTemplate
from ...text.token_text import TokenTexts
from ...text.tokenizer import Tokenizer
from ..routing.facts import ModelFacts
from .defaults import NO_DEFAULTS, SamplingDefaults


class OffersModels(Protocol):
    """Source of the served models: the flow, or a test."""

    def models(self) -> Sequence[ModelFacts]:
        """Models of the connected workers."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model, as the validator needs it."""

    name: str
    max_model_len: int
    vocab_size: int
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: a base model, for completions only
    token_texts: TokenTexts
    directory: str = ""
    defaults: SamplingDefaults = NO_DEFAULTS  # for fields that a request does not give
    parsers: Parsers = NO_PARSERS  # of reasoning and tool calls in its answers
    leaves_calls: bool = False  # the operator wants calls to stay content
    needs_special_tokens: bool = False  # its answers can be parsed only with the text of special tokens
    adapter: bytes = b""  # digest of the adapter that answers under this name; empty: none
    base: str = ""  # with an adapter: the model that it changes

    def special_id(self, text: str) -> int | None:
        """Id of the special token with this text; None: it is none, or the model has no such token."""
        id_ = self.tokenizer.backend.token_to_id(text)
        return id_ if id_ in self.tokenizer.special_ids and id_ < self.vocab_size else None


class ModelDirectory:
    """Models by name. Loading takes some ten milliseconds and happens in a thread."""

    def __init__(
        self,
        source: OffersModels,
        *,
        reads_defaults: bool = True,
        parsers: Parsers = OWN_PARSERS,
        chat_template: str | None = None,
    ) -> None:
        """`reads_defaults` false: ignore the sampling defaults of checkpoints. `parsers`: names.

        `chat_template`: source of the template for all models; None: each has its checkpoint's own.
        """
        self._source = source
        self._parsers = parsers
        self._chat_template = chat_template
        self._reads_defaults = reads_defaults
        self._loaded: dict[tuple[str, str, int], ServedModel] = {}
        self._loading = asyncio.Lock()

    def names(self) -> list[str]:
        """Names of the served models, sorted; adapters last, because some clients take the first name."""
        found = sorted(self._source.models(), key=lambda facts: (facts.adapter is not None, facts.name))
        return [facts.name for facts in found]

    def facts(self, name: str) -> ModelFacts:
        """Facts of a model from its workers; with an empty `name`, those of the only served model without an adapter.

        Raises:
            ModelNotFound: no worker serves it.
            Unavailable: no worker is ready yet.
        """
        served = {facts.name: facts for facts in self._source.models()}
        if not served:
            raise Unavailable("no worker is ready yet; try again soon", retry_after_s=2.0)
        whole = [facts for facts in served.values() if facts.adapter is None]
        if not name and len(whole) == 1:
            return whole[0]
        if name not in served:
            known = ", ".join(sorted(served))
            raise ModelNotFound(f"model is {name[:200]!r}; this cluster serves {known}", param="model")
        return served[name]

    async def get(self, name: str | None) -> ServedModel:
        """The model, loaded.

        Raises:
            ModelNotFound, Unavailable: raised by `facts`.
            CheckpointError: its tokenizer, template or sampling defaults cannot be read.
        """
        facts = self.facts(name or "")
        key = (facts.base or facts.name, facts.path, facts.max_model_len)
        async with self._loading:
            if key not in self._loaded:
                self._loaded[key] = await asyncio.to_thread(
                    _load, facts, self._reads_defaults, self._parsers, self._chat_template
                )
        loaded = self._loaded[key]
        if facts.adapter is not None:  # it answers with the model's tokenizer, template and defaults
            return replace(loaded, name=facts.name, adapter=facts.adapter.digest, base=facts.base)
        return loaded


def _load(facts: ModelFacts, reads_defaults: bool, parsers: Parsers, chat_template: str | None) -> ServedModel:
    directory = Path(facts.path)
    tokenizer, template = Tokenizer.load(directory), ChatTemplate.load(directory, given=chat_template)
    tokenizer.prepare()
    if template is not None:
        _ = template.traits  # computed now, so that the first request does not wait for it
    chosen = parsers_of(template.source if template else None, *parsers)
    special = set(map(tokenizer.token, tokenizer.special_ids))
    return ServedModel(
        name=facts.base or facts.name,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        tokenizer=tokenizer,
        template=template,
        token_texts=TokenTexts(tokenizer),
        directory=facts.path,
        defaults=SamplingDefaults.load(directory, facts.vocab_size) if reads_defaults else NO_DEFAULTS,
        parsers=chosen,
        leaves_calls=parsers.tools == NONE,
        needs_special_tokens=not special.isdisjoint(chosen.words),
    )
