"""Load generators from PyPI, unmodified, each through its own command line against `twostroke serve`, to the end.

    python bench/load_generators/campaign.py [--only TOOL ...] [--all] [--port PORT] [--keep DIR]

Each tool has an environment of its own under .bench-envs/. A run passes when the tool exits with 0, its own export has
the expected number of finished requests and tokens and not one error, and the router counted as many. guidellm and
aiperf always run; `--all` adds lm-eval, llmeter and genai-bench, each where it installs. The results are
written when nothing was left out by `--only`. Exit status 1: a run did not pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exports import Outcome, UnreadableExport, verdict
from generators import OUTPUT_TOKENS, PROMPT_TOKENS, TOOLS, USUAL, Run, Tool
from server import outcomes, served

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report
from environments import ensure
from environments import versions as installed_versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOKENIZER = ROOT / "model" / "bundled"
RUN_TIMEOUT_S = 600.0
LOG_LINES = 30  # of a tool whose run did not pass


@dataclass(frozen=True)
class Result:
    """One run: what the tool and the router say, and what is wrong with it."""

    tool: str
    run: str
    command: str
    seconds: float
    outcome: Outcome | None
    router: dict[str, int]  # requests by outcome, during this run
    wrong: tuple[str, ...]  # empty: it passed


def run_tool(tool: Tool, run: Run, url: str, folder: Path) -> Result:
    """Call the tool once and judge its export."""
    folder.mkdir(parents=True)
    places = {"url": url, "tokenizer": str(TOKENIZER), "out": str(folder), "here": str(HERE)}
    said = [_filled(word, places) for word in (*tool.program, *run.arguments)]
    before, began_s = outcomes(url), time.monotonic()
    wrong: list[str] = []
    outcome = None
    with (folder / "said.log").open("w") as log:
        try:
            subprocess.run(
                [str(tool.environment.folder / "bin" / said[0]), *said[1:]],
                check=True,
                cwd=ROOT,
                env=_surroundings(tool),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=RUN_TIMEOUT_S,
            )
        except subprocess.CalledProcessError as error:
            wrong.append(f"it ended with status {error.returncode}")
        except subprocess.TimeoutExpired:
            wrong.append(f"it was not at its end after {RUN_TIMEOUT_S:g} s")
    seconds = time.monotonic() - began_s
    router = {name: count - before.get(name, 0) for name, count in outcomes(url).items()}
    try:
        outcome = tool.read(folder)
        wrong += verdict(run.expected, outcome, router)
    except (UnreadableExport, KeyError, ValueError) as error:
        wrong.append(f"its export is not as expected: {type(error).__name__}: {error}")
    shown = {**places, "url": "URL", "tokenizer": "model/bundled", "out": "OUT", "here": "bench/load_generators"}
    command = " ".join(_filled(word, shown) for word in (*tool.program, *run.arguments))
    return Result(tool.name, run.name, command, seconds, outcome, router, tuple(wrong))


def _filled(word: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        word = word.replace("{" + name + "}", value)
    return word


def _surroundings(tool: Tool) -> dict[str, str]:
    """The environment's own programs first; no proxy, no hub, and nothing of our own packages."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept.pop("PYTHONPATH", None)
    return {**kept, "PATH": f"{tool.environment.folder / 'bin'}:{kept.get('PATH', '')}", **tool.surroundings}


def campaign(
    tools: list[Tool], folder: Path, port: int
) -> tuple[list[Result], dict[str, dict[str, str]], dict[str, str]]:
    """All runs of all tools against one cluster; versions by tool; why a tool is absent."""
    absent = {tool.name: reason for tool in tools if (reason := ensure(tool.environment))}
    there = [tool for tool in tools if tool.name not in absent]
    versions = {tool.name: installed_versions(tool.environment) for tool in there}
    results: list[Result] = []
    with served(folder / "serve.log", port=port) as url:
        for tool in there:
            for number, run in enumerate(tool.runs):
                place = folder / tool.name.replace(" ", "_") / str(number)
                result = run_tool(tool, run, url, place)
                results.append(result)
                if result.wrong:
                    print("".join((place / "said.log").read_text(errors="replace").splitlines(True)[-LOG_LINES:]))
                print(
                    f"{tool.name}: {run.name}: {'; '.join(result.wrong) or 'passed'} ({result.seconds:.0f} s)",
                    flush=True,
                )
    return results, versions, absent


def body(results: list[Result], versions: dict[str, dict[str, str]], absent: dict[str, str]) -> str:
    """The tables."""
    rows = []
    for result in results:
        told = result.outcome
        figures = [_shown(getattr(told, name, None)) for name in _COLUMNS] if told else ["–"] * len(_COLUMNS)
        finished = [told.finished, told.failed] if told else ["–", "–"]
        rows.append([result.tool, result.run, *finished, *figures, "; ".join(result.wrong) or "passed"])
    headings = ("tool", "run", "finished", "errors", *_COLUMNS.values(), "verdict")
    installed = [
        [tool, ", ".join(f"{name} {version}" for name, version in found.items())] for tool, found in versions.items()
    ]
    parts = [
        f"`twostroke serve --launcher process`, the bundled model, one prefill and one decode worker; prompts of about "
        f"{PROMPT_TOKENS} tokens, {OUTPUT_TOKENS} new tokens each where the tool can say so. Figures are each tool's "
        f"own, from its export. All run beside the server on the same cores: this is no measure of the server alone.",
        report.table(headings, rows),
        report.table(("tool", "versions"), installed + [[tool, f"absent: {why}"] for tool, why in absent.items()]),
        "Commands (OUT is an empty folder, URL the server's address):",
        "\n".join(f"- `{result.command}`" for result in results),
    ]
    return "\n\n".join(parts)


_COLUMNS = {
    "output_tokens": "output tokens",
    "ttft_p50_ms": "TTFT p50 ms",
    "itl_p50_ms": "ITL p50 ms",
    "latency_p50_ms": "latency p50 ms",
    "output_tokens_per_s": "tokens/s",
    "note": "beside",
}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return "–" if value in (None, "") else str(value)


def main() -> int:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [tool.name for tool in TOOLS]
    parser.add_argument("--only", nargs="+", metavar="TOOL", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--all", action="store_true", help="also the tools that not every machine can install")
    parser.add_argument("--port", type=int, default=0, help="of the server; default: any that is free")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep exports and logs in this new folder")
    given = parser.parse_args()
    wanted = given.only or (names if given.all else USUAL)
    tools = [tool for tool in TOOLS if tool.name in wanted]
    facts = report.machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results, versions, absent = campaign(tools, folder.resolve(), given.port)
    text = body(results, versions, absent)
    print(text)
    if not given.only:
        data = {"results": [asdict(result) for result in results], "versions": versions, "absent": absent}
        title = "Load generators from PyPI, unmodified, against `twostroke serve`"
        print(report.save("load_generators", title, text, data, facts))
    missing = [name for name in USUAL if name in wanted and name in absent]
    return 1 if missing or any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
