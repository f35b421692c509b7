"""Baseline: an interpolated Kneser-Ney n-gram model over token ids. Knows no text and no network.

Sources: Kneser and Ney 1995; Chen and Goodman 1999, section 3 (the interpolated form, and the modified one with three
discounts per order). An n-gram is one 64-bit number, so that counting is sorting; n times the bits of a token must fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Order:
    """Counts of one order: n-grams with their counts, and totals per history."""

    grams: Ids  # [num_grams] ascending
    counts: Ids  # [num_grams], at least 1
    histories: Ids  # [num_histories] ascending
    totals: Floats  # [num_histories] sum of the counts after each history
    kept_back: Floats  # [num_histories] sum of the discounts taken from them
    discounts: Floats  # [4]: discounts of counts 0, 1, 2, and 3 or more


class KneserNey:
    """Probabilities of the next token after `order - 1` tokens of context."""

    def __init__(
        self, documents: Sequence[Ids], vocab_size: int, *, order: int = 5, bos: int = 0, modified: bool = False
    ) -> None:
        """Count `documents`, each beginning with `bos`; histories before the beginning are filled with `bos`."""
        self.vocab_size, self.order, self.bos = vocab_size, order, bos
        self._bits = (vocab_size - 1).bit_length()
        if self._bits * order > 63:
            raise ValueError(f"{order} tokens of {self._bits} bits don't fit 63 bits; choose a lower order")
        grams, counts = np.unique(
            np.concatenate([self._keys(self._windows(document)) for document in documents]), return_counts=True
        )
        self._orders: list[_Order] = []
        for length in range(order, 0, -1):
            self._orders.insert(0, _counted(grams, counts.astype(np.int64), self._bits, modified))
            # Below the highest order, the count of an n-gram is the number of different tokens before it.
            suffixes = grams & ((1 << self._bits * (length - 1)) - 1)
            grams, counts = np.unique(suffixes, return_counts=True)

    def log_probabilities(self, document: Ids) -> Floats:
        """Natural log probabilities of `document[1:]`, each given the tokens before it."""
        probability = self._probabilities(self._keys(self._windows(document)))
        logs: Floats = np.log(probability)
        return logs

    def distribution(self, context: Sequence[int]) -> Floats:
        """Probabilities of all tokens after `context`, [vocab_size]; shorter contexts are filled with `bos`."""
        padded = [*[self.bos] * self.order, *context][-(self.order - 1) :] if self.order > 1 else []
        rows = np.empty((self.vocab_size, self.order), dtype=np.int64)
        rows[:, :-1] = padded
        rows[:, -1] = np.arange(self.vocab_size)
        return self._probabilities(self._keys(rows))

    def _probabilities(self, keys: Ids) -> Floats:
        """Probability of each n-gram's last token, interpolated from the uniform distribution upwards by order."""
        probability = np.full(len(keys), 1.0 / self.vocab_size)
        for length, order in enumerate(self._orders, start=1):
            own = keys & ((1 << self._bits * length) - 1)
            probability = _interpolated(order, own, own >> self._bits, probability)
        return probability

    def _windows(self, document: Ids) -> Ids:
        """Windows of `order` tokens that end with each token after the first: [len(document) - 1, order]."""
        padded = np.concatenate([np.full(self.order - 2, self.bos), document]) if self.order > 1 else document[1:]
        return np.lib.stride_tricks.sliding_window_view(padded, self.order)

    def _keys(self, rows: Ids) -> Ids:
        keys = np.zeros(len(rows), dtype=np.int64)
        for column in range(self.order):
            keys = (keys << self._bits) | rows[:, column]
        return keys


def perplexity(model: KneserNey, documents: Sequence[Ids]) -> float:
    """Perplexity per token, over every token except each document's first."""
    logs = np.concatenate([model.log_probabilities(document) for document in documents])
    return float(np.exp(-logs.mean()))


def _counted(grams: Ids, counts: Ids, bits: int, modified: bool) -> _Order:
    discounts = _discounts(counts, modified)
    histories, inverse = np.unique(grams >> bits, return_inverse=True)
    totals = np.bincount(inverse, weights=counts).astype(np.float64)
    kept_back = np.bincount(inverse, weights=discounts[np.minimum(counts, 3)]).astype(np.float64)
    return _Order(grams, counts, histories, totals, kept_back, discounts)


def _discounts(counts: Ids, modified: bool) -> Floats:
    """Discounts of the counts 0, 1, 2 and 3 or more, estimated from the numbers of n-grams with counts 1 to 4."""
    once, twice, thrice, four = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    # If the estimate would be 0 or 1, as on tiny corpora, 0.75 keeps every probability above zero.
    single = once / (once + 2 * twice) if once and twice else 0.75
    if not modified or not (once and twice and thrice and four):
        return np.array([0.0, single, single, single])
    return np.array(
        [0.0, 1 - 2 * single * twice / once, 2 - 3 * single * thrice / twice, 3 - 4 * single * four / thrice]
    )


def _interpolated(order: _Order, grams: Ids, histories: Ids, lower: Floats) -> Floats:
    """(count - discount + kept back * lower) / total; after an unseen history only the lower order."""
    counts = _looked_up(order.grams, order.counts, grams)
    totals = _looked_up(order.histories, order.totals, histories)
    kept_back = _looked_up(order.histories, order.kept_back, histories)
    own = np.maximum(counts - order.discounts[np.minimum(counts, 3).astype(np.int64)], 0.0)
    seen = totals > 0
    safe = np.where(seen, totals, 1.0)
    return np.where(seen, (own + kept_back * lower) / safe, lower)


def _looked_up(keys: Ids, values: npt.NDArray[np.int64] | Floats, wanted: Ids) -> npt.NDArray[np.int64] | Floats:
    """Look up `values` by keys `wanted`; 0 for an absent key. `keys` are ascending."""
    positions = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[positions] == wanted, values[positions], 0)
