"""Each load generator: its packages, and the runs it is asked for through its own command line. Starts nothing.

In an argument `{url}` is the server, `{tokenizer}` the bundled model's folder, `{out}` the run's empty folder and
`{here}` the folder of this file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import exports
from exports import Expected, Reader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from environments import Environment

MODEL = "twostroke-bundled"
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 32
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
NUM_QUESTIONS = 24  # lines of questions/questions.jsonl


@dataclass(frozen=True)
class Run:
    """One call of a tool, and what must come of it."""

    name: str
    arguments: tuple[str, ...]
    expected: Expected


@dataclass(frozen=True)
class Tool:
    """One load generator. `program` is the console script or Python file that its environment runs."""

    name: str
    environment: Environment
    program: tuple[str, ...]
    read: Reader
    runs: tuple[Run, ...]
    surroundings: dict[str, str] = field(default_factory=lambda: dict(OFFLINE))


def _guidellm_run(
    name: str, endpoint: str, profile: str, num_requests: int, *, loads: int = 1, stream: bool = True, turns: int = 1
) -> Run:
    arguments = (
        *("--backend", f"kind=openai_http,target={{url}},request_format={endpoint},stream={str(stream).lower()}"),
        *("--profile", profile, "--constraint", f"kind=max_requests,count={num_requests}"),
        *("--tokenizer", "kind=huggingface_auto,model={tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS},turns={turns}"),
        *("--output", "kind=json,path={out}/report.json", "--disable-progress"),
    )
    finished = num_requests * loads
    return Run(name, arguments, Expected(finished, finished * OUTPUT_TOKENS))


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

GUIDELLM = Tool(
    "guidellm",
    Environment("guidellm", (("torch==2.13.0",), ("guidellm==0.8.1",)), shown=("guidellm", "transformers")),
    ("guidellm", "run"),
    exports.guidellm,
    (
        _guidellm_run("chat, streamed, one after the other", CHAT, "kind=synchronous", 20),
        _guidellm_run("chat, streamed, 4 at a time", CHAT, "kind=concurrent,streams=4", 80),
        _guidellm_run("chat, whole, 4 at a time", CHAT, "kind=concurrent,streams=4", 80, stream=False),
        _guidellm_run("chat of 3 turns, streamed, 2 at a time", CHAT, "kind=concurrent,streams=2", 45, turns=3),
        _guidellm_run("completions, streamed, 2/s", COMPLETIONS, "kind=constant,rate=2", 50),
        _guidellm_run("completions, whole, 2/s, Poisson", COMPLETIONS, "kind=poisson,rate=2", 50, stream=False),
        _guidellm_run("completions, streamed, sweep", COMPLETIONS, "kind=sweep,sweep_size=4", 20, loads=4),
    ),
)


def _aiperf_run(name: str, endpoint: str, num_requests: int, *more: str, tokens: bool = True) -> Run:
    arguments = (
        *("--model", MODEL, "--url", "{url}", "--endpoint-type", endpoint, "--tokenizer", "{tokenizer}"),
        *("--isl", str(PROMPT_TOKENS), "--osl", str(OUTPUT_TOKENS), "--extra-inputs", "ignore_eos:true"),
        *("--request-count", str(num_requests), "--random-seed", "1"),
        *("--artifact-dir", "{out}", "--ui-type", "none", *more),
    )
    return Run(name, arguments, Expected(num_requests, num_requests * OUTPUT_TOKENS if tokens else None))


_COUNTED = ("--use-server-token-count",)  # else it counts the tokens that the answer's text makes

AIPERF = Tool(
    "aiperf",
    Environment("aiperf", (("aiperf==0.13.0",),), shown=("aiperf", "transformers")),
    ("aiperf", "profile"),
    exports.aiperf,
    (
        _aiperf_run(
            "chat, streamed, usage in every chunk, 4 at a time",
            *("chat", 80, "--streaming", "--concurrency", "4", *_COUNTED, "--per-chunk-usage"),
        ),
        _aiperf_run("chat, streamed, 1/s, Poisson", "chat", 25, "--streaming", "--request-rate", "1", tokens=False),
        _aiperf_run("chat, whole, 4 at a time", "chat", 80, "--concurrency", "4", *_COUNTED),
        _aiperf_run(
            "chat of 3 turns, streamed, 2 at a time",
            *("chat", 45, "--streaming", "--concurrency", "2", *_COUNTED),
            *("--conversation-num", "15", "--conversation-turn-mean", "3", "--conversation-turn-stddev", "0"),
        ),
        _aiperf_run(
            "completions, streamed, 2/s",
            *("completions", 50, "--streaming", "--request-rate", "2", "--arrival-pattern", "constant", *_COUNTED),
        ),
        _aiperf_run(
            "completions, whole, legacy max_tokens, one after the other",
            *("completions", 20, "--concurrency", "1", "--use-legacy-max-tokens", *_COUNTED),
        ),
    ),
    surroundings={"TOKENIZERS_PARALLELISM": "false"},  # offline it takes no tokenizer by path
)


def _lm_eval_run(name: str, task: str, batch: int, answers: int) -> Run:
    model = f"model={MODEL},base_url={{url}}/v1/completions,tokenizer={{tokenizer}},num_concurrent=2,max_length=2048"
    arguments = (
        *("--model", "local-completions", "--model_args", model, "--batch_size", str(batch)),
        *("--include_path", "{here}/questions", "--tasks", task, "--output_path", "{out}", "--log_samples"),
    )
    return Run(name, arguments, Expected(answers))


LM_EVAL = Tool(
    "lm-eval",
    Environment(
        "lm_eval",
        (("torch==2.13.0",), ("lm_eval[api]==0.4.13", "transformers==5.24.0")),
        shown=("lm_eval", "transformers"),
    ),
    ("lm_eval",),
    exports.lm_eval,
    (
        _lm_eval_run("scores of 3 choices, 4 prompts a request", "twostroke_choice", 4, 3 * NUM_QUESTIONS),
        _lm_eval_run("perplexity, one prompt a request", "twostroke_perplexity", 1, NUM_QUESTIONS),
        _lm_eval_run("texts, 4 prompts a request", "twostroke_text", 4, NUM_QUESTIONS),
    ),
)

LLMETER = Tool(
    "llmeter",
    Environment("llmeter", (("llmeter[openai]==0.2.0", "openai==2.54.0"),), shown=("llmeter", "openai")),
    ("python", "{here}/run_llmeter.py"),
    exports.llmeter,
    tuple(
        Run(name, ("{url}", "{out}", MODEL, kind, "4", "10", str(OUTPUT_TOKENS)), Expected(40))
        for name, kind in (("chat, streamed, 4 at a time", "stream"), ("chat, whole, 4 at a time", "whole"))
    ),
)

GENAI_BENCH = Tool(
    "genai-bench",
    Environment("genai_bench", (("genai-bench==0.0.5",),), shown=("genai-bench", "transformers")),
    ("genai-bench", "benchmark"),
    exports.genai_bench,
    (
        Run(
            "chat, streamed, 1 and 4 at a time",
            (
                *("--api-backend", "vllm", "--api-base", "{url}", "--api-key", "none", "--api-model-name", MODEL),
                *("--task", "text-to-text", "--model-tokenizer", "{tokenizer}"),
                *("--traffic-scenario", f"D({PROMPT_TOKENS},{OUTPUT_TOKENS})"),
                *("--num-concurrency", "1", "--num-concurrency", "4"),
                *("--max-time-per-run", "1", "--max-requests-per-run", "20"),
                *("--experiment-base-dir", "{out}", "--experiment-folder-name", "report", "--log-dir", "{out}"),
            ),
            # What is under way when it stops is cut off and not counted.
            Expected(40, at_least=True, router_counts_all=False),
        ),
    ),
)

TOOLS = (GUIDELLM, AIPERF, LM_EVAL, LLMETER, GENAI_BENCH)
USUAL = ("guidellm", "aiperf")  # what must run on every machine; the others where they install
