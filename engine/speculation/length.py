"""How many tokens to guess for one request, by what became of the guesses before. Pure.

The length begins at one, grows by one when all guesses were right, and is halved when less than half of them were. At
zero the request rests: nothing is guessed for `rest` tokens, twice as many each time, then one token is tried. So a
text that cannot be guessed soon costs nothing, and one that becomes predictable is found again.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_REST, LONGEST_REST = 16, 512  # tokens


@dataclass(slots=True)
class DraftLength:
    """Length of the next guess of one request, at most `most`."""

    most: int
    length: int = 1  # now; 0: it rests
    rest: int = FIRST_REST
    resumes_at: int = 0  # generated tokens of the sequence at which the rest ends

    def at(self, num_generated: int) -> int:
        """Most tokens to guess after `num_generated` generated ones."""
        if self.length == 0 and num_generated >= self.resumes_at:
            self.length = 1
        return self.length

    def judge(self, num_drafted: int, num_accepted: int, num_generated: int) -> None:
        """Take the outcome of a guess. `num_generated`: tokens generated now, the accepted ones included."""
        if num_accepted == num_drafted:
            self.rest = FIRST_REST
            if num_drafted >= self.length:
                self.length = min(self.length + 1, self.most)
        elif 2 * num_accepted < num_drafted:
            self.length //= 2
            if self.length == 0:
                self.resumes_at = num_generated + self.rest
                self.rest = min(2 * self.rest, LONGEST_REST)
