"""What the load generators' exports are read as, and which outcomes do not pass."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "bench" / "load_generators" / "exports.py"


def load():
    """The module under a name of its own: its folder stays out of the path."""
    spec = importlib.util.spec_from_file_location("bench_load_generators_exports", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


exports = load()
GOOD = exports.Outcome(finished=20, failed=0, output_tokens=640)
EXPECTED = exports.Expected(finished=20, output_tokens=640)
ROUTER = {"finished": 20, "rejected": 0, "cancelled": 0, "failed": 0}


def guidellm_benchmark(successful, errored, incomplete, tokens, seconds):
    def spread(median):
        return {"successful": {"median": median, "count": successful, "total_sum": median * successful}}

    metrics = {
        "request_totals": {"successful": successful, "errored": errored, "incomplete": incomplete},
        "output_token_count": spread(tokens / successful),
        "request_latency": spread(0.5),
        "time_to_first_token_ms": spread(40.0),
        "inter_token_latency_ms": spread(0.0),
    }
    return {"metrics": metrics, "duration": seconds}


def test_all_loads_of_a_guidellm_sweep_count(tmp_path):
    loads = [guidellm_benchmark(8, 0, 0, 256, 4.0), guidellm_benchmark(12, 2, 1, 384, 6.0)]
    (tmp_path / "report.json").write_text(json.dumps({"benchmarks": loads}))
    outcome = exports.guidellm(tmp_path)
    assert (outcome.finished, outcome.failed, outcome.output_tokens) == (20, 3, 640)
    assert (outcome.ttft_p50_ms, outcome.itl_p50_ms, outcome.latency_p50_ms) == (40.0, None, 500.0)
    assert outcome.output_tokens_per_s == pytest.approx(64.0)


@pytest.mark.parametrize(("complete", "errors", "failed"), [(True, [], 0), (False, [], 1), (True, [{"count": 3}], 3)])
def test_an_aiperf_run_fails_with_errors_or_when_it_was_cut_short(tmp_path, complete, errors, failed):
    told = {"request_count": {"avg": 20.0}, "total_output_tokens": {"avg": 640.0}, "error_summary": errors}
    told |= {"was_cancelled": False, "is_complete": complete, "time_to_first_token": {"p50": 40.0}}
    (tmp_path / "profile_export_aiperf.json").write_text(json.dumps(told))
    scraped = {"summary": {"endpoints_successful": ["URL"]}, "metrics": {"a": {}, "b": {}}}
    (tmp_path / "server_metrics_export.json").write_text(json.dumps(scraped))
    outcome = exports.aiperf(tmp_path)
    assert (outcome.finished, outcome.failed, outcome.output_tokens) == (20, failed, 640)
    assert outcome.ttft_p50_ms == 40.0
    assert outcome.note == "2 metrics read from /metrics"


def test_a_question_without_an_answer_is_a_failed_request_of_lm_eval(tmp_path):
    samples = [{"resps": [[["-1.5", "True"]], [["-2.0", "False"]]]}, {"resps": [[""], ["text"]]}]
    (tmp_path / "samples_choice.jsonl").write_text("\n".join(json.dumps(sample) for sample in samples))
    (tmp_path / "results_now.json").write_text(json.dumps({"results": {"choice": {"acc,none": 0.5, "alias": "c"}}}))
    outcome = exports.lm_eval(tmp_path)
    assert (outcome.finished, outcome.failed, outcome.note) == (3, 1, "choice acc 0.50")


@pytest.mark.parametrize("read", [exports.guidellm, exports.aiperf, exports.lm_eval, exports.genai_bench])
def test_a_missing_export_is_no_success(tmp_path, read):
    with pytest.raises(exports.UnreadableExport):
        read(tmp_path)


def test_an_outcome_as_expected_passes():
    assert exports.verdict(EXPECTED, GOOD, ROUTER) == []


@pytest.mark.parametrize(
    ("outcome", "router", "wrong"),
    [
        (exports.Outcome(20, 1, 640), ROUTER, "1 requests failed"),
        (exports.Outcome(19, 0, 640), ROUTER | {"finished": 19}, "19 requests finished"),
        (exports.Outcome(21, 0, 640), ROUTER | {"finished": 21}, "21 requests finished"),
        (exports.Outcome(20, 0, 639), ROUTER, "639 output tokens"),
        (GOOD, ROUTER | {"rejected": 1}, "1 rejected"),
        (GOOD, ROUTER | {"failed": 1}, "1 failed"),
        (GOOD, ROUTER | {"finished": 22}, "22 finished"),
        (GOOD, {}, "None finished"),
    ],
)
def test_what_differs_from_the_expected_does_not_pass(outcome, router, wrong):
    (found,) = exports.verdict(EXPECTED, outcome, router)
    assert wrong in found
