"""What the engine's benchmark makes of traces: rates, ratios per round, shares, verdicts."""

import importlib.util
import sys
from pathlib import Path

import pytest

ENGINE = Path(__file__).resolve().parents[2] / "bench" / "engine"


def load(name):
    """A module of the benchmark under a name of its own: its folder stays out of the path."""
    spec = importlib.util.spec_from_file_location(f"bench_engine_{name}", ENGINE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


figures = load("figures")


def steady(batch, steps, begin_s=1.0, step_s=0.1):
    """All sequences get a token in every step."""
    return [(begin_s + step_s * step, list(range(batch))) for step in range(steps)]


def test_prefill_lasts_until_the_last_sequence_has_its_first_token():
    events = [(0.5, [0, 1]), (1.0, [2]), (2.0, [0, 1, 3]), (3.0, [0])]
    assert figures.prefill_tokens_per_s(events, batch=4, prompt_tokens=512) == pytest.approx(4 * 512 / 2.0)
    with pytest.raises(ValueError, match="4 of 5"):
        figures.prefill_tokens_per_s(events, batch=5, prompt_tokens=512)


@pytest.mark.parametrize("batch", [1, 16])
def test_a_steady_batch_decodes_at_its_pace(batch):
    window = figures.decode_window(steady(batch, 32), batch, 32)
    assert window.tokens == batch * 31
    assert window.tokens_per_s == pytest.approx(batch / 0.1)


def test_steps_in_which_others_prefill_or_have_ended_do_not_count():
    # Two sequences; the second comes in after five slow steps, the first ends ten steps before it.
    slow = [(1.0 + step, [0]) for step in range(5)]
    both = [(6.0 + 0.1 * step, [0, 1]) for step in range(20)]
    alone = [(8.0 + step, [1]) for step in range(10)]
    window = figures.decode_window(slow + both + alone, 2, 32)
    assert (window.begin_s, window.end_s) == (6.0, pytest.approx(7.9))
    assert window.tokens == 2 * 19


def test_no_more_steps_count_than_the_work_has():
    window = figures.decode_window(steady(2, 48), 2, 32)
    assert window.tokens == 2 * 31


def test_too_few_common_steps_are_no_figure():
    with pytest.raises(ValueError, match="only 6 steps"):
        figures.decode_window(steady(2, 7), 2, 32)


def test_what_lies_outside_the_spans_is_the_rest():
    window = figures.Window(1.0, 2.0, 10)
    assert figures.outside_share(window, [(0.5, 1.2), (1.3, 1.9), (1.95, 3.0), (4.0, 5.0)]) == pytest.approx(0.15)


def test_ratios_are_taken_within_a_round():
    # The machine slows down in the second round; who is best changes too.
    rounds = {"ours": [30.0, 10.0, 30.0], "a": [20.0, 4.0, 10.0], "b": [9.0, 5.0, 15.0]}
    ratio = figures.ratio_to_best(rounds, "ours", ["a", "b"])
    assert (ratio.median, ratio.lowest, ratio.highest) == (2.0, 1.5, 2.0)
    assert ratio.rival == "a"  # by median: 10 against 9


def test_rounds_without_both_sides_are_left_out():
    rounds = {"ours": [30.0, None, 30.0], "a": [None, 4.0, 10.0], "b": [None, None]}
    assert figures.ratio_to_best(rounds, "ours", ["a", "b"]).median == 3.0
    assert figures.ratio_to_best(rounds, "ours", ["b"]) is None
    assert figures.ratio_to_best(rounds, "absent", ["a"]) is None


def test_agreement_counts_equal_first_tokens():
    ids = {"reference": [1, 2, 3, 4], "same": [1, 2, 3, 4], "half": [1, 2, 9, 9], "short": [1]}
    assert figures.agreement(ids, "reference") == {"reference": 1.0, "same": 1.0, "half": 0.5}
    assert figures.agreement(ids, "absent") == {}


def test_every_goal_names_a_measure_that_is_taken():
    taken = {measure.name for measure in figures.MEASURES}
    assert {goal.measure for goal in figures.GOALS} <= taken


def test_the_memory_bound_has_a_factor_and_a_slack():
    assert figures.memory_bound(1_000_000_000, 0) == pytest.approx(1.55e9)


def test_prompts_depend_on_their_seed_alone_and_share_no_block():
    protocol = load("protocol")
    first, again, other = protocol.prompts(3, 5), protocol.prompts(3, 5), protocol.prompts(3, 6)
    assert first == again
    assert {len(prompt) for prompt in first} == {protocol.PROMPT_TOKENS}
    assert not {tuple(prompt[:16]) for prompt in first} & {tuple(prompt[:16]) for prompt in other}


def test_a_trace_keeps_the_first_id_of_every_sequence():
    trace = load("protocol").Trace(2)
    trace.note({0: [7]})
    trace.note({0: [8], 1: [9, 10]})
    trace.note({1: []})
    assert [places for _, places in trace.events] == [[0], [0, 1, 1]]
    assert trace.first_ids == [7, 9]


def test_the_tokenizer_is_one_that_can_be_loaded(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    checkpoint = load("checkpoint")
    import json

    built = tokenizers.Tokenizer.from_str(json.dumps(checkpoint.tokenizer()))
    assert built.get_vocab_size() == checkpoint.VOCABULARY
    text = "größer als 3 µs\n"
    assert built.decode(built.encode(text).ids) == text
