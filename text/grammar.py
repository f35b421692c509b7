"""Structured output: which tokens a grammar allows next. Knows no request, no step and no logits.

    Grammar ─ program_of ─▶ llguidance's text ─ compile, bounded ─▶ GrammarCompiler's cache ─ start ─▶ Matcher

A matcher's state is a function of the grammar and the tokens that it took, so it is made anew on another worker, after
a preemption or for a repeated request from the tokens alone. Compiling and masks release the GIL.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from ..core.errors import InvalidRequest
from ..core.request import Grammar
from .grammar_program import program_of, refused
from .schemas import told
from .token_text import TokenTexts
from .tokenizer import Tokenizer

MAX_CACHED = 64  # compiled grammars
MAX_CACHED_CHARS = 1 << 21  # of their sources
MAX_COMPILE_S = 5.0  # a grammar that took longer is refused
# One unit of fuel is about 20 ns while a grammar is compiled, 70 ns while a mask is computed; a state takes 1 to 2 KB.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    max_grammar_size=200_000,
    max_lexer_states=20_000,
    max_items_in_row=2000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    verbose_errors=False,
)


class GrammarFailed(InvalidRequest):
    """A matcher cannot go on: a limit was passed, or its tokens are not those of its grammar."""


class Matcher:
    """State of one choice in its grammar. One thread at a time may use it."""

    def __init__(self, inner: LLMatcher, eos_ids: Sequence[int], vocab_size: int) -> None:
        self._inner = inner
        self._eos_ids = [id_ for id_ in eos_ids if 0 <= id_ < vocab_size]
        self._num_words = (vocab_size + 31) // 32

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take tokens of the choice, in order.

        Raises:
            GrammarFailed: the grammar does not allow one of them.
        """
        if token_ids and not self._inner.consume_tokens(list(token_ids)):
            raise GrammarFailed(_brief(self._inner.get_error()))

    def copy(self) -> Matcher:
        """A matcher of the same state, for tokens that may not stay."""
        matcher = copy.copy(self)
        matcher._inner = self._inner.deep_copy()
        return matcher

    def mask(self) -> bytes:
        """Allowed next tokens: packed bits, least significant first. Ends of the text are allowed where it may end.

        Raises:
            GrammarFailed: a limit was passed, or no token is allowed.
        """
        words = np.zeros(self._num_words, np.uint32)
        found = np.frombuffer(self._inner.compute_bitmask(), np.uint32) if not self._inner.is_stopped() else words[:0]
        if self._inner.is_error():
            raise GrammarFailed(_brief(self._inner.get_error()))
        words[: len(found)] = found[: self._num_words]
        may_end = self._inner.is_accepting()
        for id_ in self._eos_ids:
            bit = np.uint32(1 << id_ % 32)
            words[id_ // 32] = words[id_ // 32] | bit if may_end else words[id_ // 32] & ~bit
        if not words.any():
            raise GrammarFailed("the grammar allows no token here")
        return words.tobytes()


@dataclass(frozen=True, slots=True)
class _Compiled:
    inner: LLMatcher
    num_chars: int


class GrammarCompiler:
    """Compiled grammars of one tokenizer, the most recently used ones. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]) -> None:
        """`vocab_size`: rows of the model's logits. `eos_ids`: the tokens that end a text of this model."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(sorted(eos_ids))
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, _Compiled] = OrderedDict()
        self._num_chars = 0

    def start(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of a text. Compiles the grammar if it is not known: call it in a thread.

        Raises:
            InvalidRequest: the grammar is wrong, or passes a limit; names which.
        """
        if not self._eos_ids:
            raise refused("the model has no end-of-sequence token, so a grammar could never end its text")
        key = digest_of(grammar)
        with self._lock:
            known = self._compiled.get(key)
            if known is not None:
                self._compiled.move_to_end(key)
        if known is None:
            known = _Compiled(self._compile(grammar), len(grammar.source))
            self._keep(key, known)
        return Matcher(known.inner.deep_copy(), self._eos_ids, self._vocab_size)

    def check(self, grammar: Grammar) -> None:
        """Check that a grammar can be compiled and begun. Takes as long as `start`.

        Raises:
            InvalidRequest: it cannot; names the reason.
        """
        try:
            self.start(grammar).mask()
        except GrammarFailed as error:
            raise refused(f"{grammar.kind} is refused: {error}") from None

    @property
    def num_cached(self) -> int:
        """Number of compiled grammars that are kept."""
        return len(self._compiled)

    def _keep(self, key: bytes, compiled: _Compiled) -> None:
        with self._lock:
            if key in self._compiled:
                return
            self._compiled[key] = compiled
            self._num_chars += compiled.num_chars
            while len(self._compiled) > MAX_CACHED or (self._num_chars > MAX_CACHED_CHARS and len(self._compiled) > 1):
                _, oldest = self._compiled.popitem(last=False)
                self._num_chars -= oldest.num_chars

    def _compile(self, grammar: Grammar) -> LLMatcher:
        program = program_of(grammar, lambda text: self._tokenizer.special_words.fullmatch(text) is not None)
        vocabulary = self._tokens()
        began_s = time.monotonic()
        inner = LLMatcher(vocabulary, program, log_level=0, limits=_LIMITS)
        if inner.is_error():
            error = inner.get_error()
            about = told(json.loads(grammar.source), error) if grammar.kind == "json" else None
            raise refused(f"{grammar.kind} is refused: {about or _brief(error)}")
        took_s = time.monotonic() - began_s
        if took_s > MAX_COMPILE_S:
            raise refused(
                f"{grammar.kind} took {took_s:.1f} s to compile; at most {MAX_COMPILE_S:g} s are given to one"
            )
        return inner

    def _tokens(self) -> LLTokenizer:
        """llguidance's index of the vocabulary, made at the first use: a large one takes a second."""
        with self._making:
            if self._vocabulary is None:
                words = _Words(self._tokenizer, self._vocab_size, self._eos_ids)
                self._vocabulary = LLTokenizer(cast(TokenizerWrapper, words), eos_token=list(self._eos_ids))
            return self._vocabulary


class _Words:
    """A vocabulary as llguidance reads it: the bytes of every token."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        texts = TokenTexts(tokenizer)
        num_tokens = min(tokenizer.vocab_size, vocab_size)
        self._tokenizer = tokenizer
        self.tokens = [texts.of(id_).raw for id_ in range(num_tokens)]
        self.tokens += [b""] * (max(eos_ids, default=0) + 1 - num_tokens)
        self.special_token_ids = sorted({*tokenizer.special_ids, *eos_ids} & set(range(len(self.tokens))))
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = tokenizer.bos_id if tokenizer.bos_id is not None else eos_ids[0]

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text that a grammar forces."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except InvalidRequest:  # half a character
            return []


def digest_of(grammar: Grammar) -> bytes:
    """Name of a grammar: equal sources of one kind have the same."""
    return hashlib.blake2b(json.dumps(grammar).encode(), digest_size=16, person=b"twostroke-gramma").digest()


def _brief(error: str) -> str:
    """The first lines of llguidance's message."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return " ".join(lines)[:300] or "it cannot be matched"
