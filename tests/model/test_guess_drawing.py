"""Guesses are drawn at the place that they are for, after the guesses before them, up to an end of the text."""

from dataclasses import replace

import pytest
import torch

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import History, SequenceStep
from twostroke.model.heads.drawing import Guess, GuessDrawer
from twostroke.model.sampling.sampler import Sampler

PARAMS = SamplingParams(max_tokens=9, temperature=0.0, stop_token_ids=(6,))
HISTORY = History((4,), (5,))


def guess_of(params, most=3):
    step = SequenceStep(SequenceKey("a", 2), 1, (5,), (), (), True, params, num_generated=7, history=HISTORY)
    return Guess(step, most)


def test_a_draw_is_keyed_by_its_place_and_sees_the_guesses_before_it():
    guess = guess_of(PARAMS)
    assert (guess.draw().choice, guess.draw().position, guess.draw().history) == (2, 7, HISTORY)
    guess.ids = (8, 9)
    assert (guess.draw().position, guess.draw().history) == (9, History((4,), (5, 8, 9)))


@pytest.mark.parametrize(
    ("token", "params", "ids"),
    [
        (3, PARAMS, (3,)),
        (6, PARAMS, ()),  # a stop token
        (1, PARAMS, ()),  # the model's end
        (1, replace(PARAMS, ignore_eos=True), (1,)),
    ],
)
def test_a_token_that_ends_the_text_is_not_guessed_and_ends_the_guess(token, params, ids):
    drawer, guess = GuessDrawer(Sampler([1]), [1], None, 10), guess_of(params)
    logits = torch.zeros(16, 10)
    logits[0, token] = 5.0
    drawer.add([guess], logits)
    assert (guess.ids, guess.wants_more) == (ids, bool(ids))


def test_a_row_that_is_no_distribution_ends_the_guess():
    drawer, guess = GuessDrawer(Sampler([1]), [1], None, 10), guess_of(PARAMS)
    drawer.add([guess], torch.full((1, 10), float("nan")))
    assert (guess.ids, guess.wants_more) == ((), False)
