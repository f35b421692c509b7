"""An attacker who measures times: does the prefix cache tell one tenant what another one has asked?

    python bench/isolation.py [--trials 200] [--prompt-tokens 400] [--port 28100]

A trial: a new random prompt; by a coin the victim asks it, or another one of the same length; then the attacker asks it
and times the first token. From the times of both kinds comes the AUC: the probability that a prompt that the victim
asked answers sooner than one that it did not; 0.5: the times tell nothing. `across` has attacker and victim under keys
of two tenants, `within` under two keys of one tenant, which share prefixes: the control that such an attack works here.

Aim: across at most 0.55 at the upper bound of the 95 % interval (bootstrap), within at least 0.9. If one is missed, the
exit status is 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent / "load_generators"))
from report import machine, save, table
from server import served

from twostroke.router.keys.digests import line_for

VICTIM, ATTACKER, COLLEAGUE = "sk-key-of-the-victim-0", "sk-key-of-the-attacker", "sk-of-the-victim-also-1"
KEYS = f"""keys:
  - {{key: '{line_for(VICTIM)}', tenant: victim}}
  - {{key: '{line_for(COLLEAGUE)}', tenant: victim}}
  - {{key: '{line_for(ATTACKER)}', tenant: attacker}}
"""
BOOTSTRAPS = 2000
MOST_ACROSS, LEAST_WITHIN = 0.55, 0.9


def auc(asked: Sequence[float], fresh: Sequence[float]) -> float:
    """Probability that an asked prompt's time is below a fresh one's; equal times count half."""
    ordered = sorted(fresh)
    below = 0.0
    for one in asked:
        low, high = _bisect(ordered, one)
        below += len(ordered) - high + (high - low) / 2
    return below / (len(asked) * len(fresh))


def _bisect(ordered: list[float], value: float) -> tuple[int, int]:
    from bisect import bisect_left, bisect_right

    return bisect_left(ordered, value), bisect_right(ordered, value)


def interval(asked: Sequence[float], fresh: Sequence[float], seed: int) -> tuple[float, float]:
    """The 95 % interval of the AUC, by resampling trials."""
    chance, found = random.Random(seed), []
    for _ in range(BOOTSTRAPS):
        found.append(auc(chance.choices(asked, k=len(asked)), chance.choices(fresh, k=len(fresh))))
    found.sort()
    return found[int(0.025 * BOOTSTRAPS)], found[int(0.975 * BOOTSTRAPS) - 1]


def ask(client: httpx.Client, key: str, prompt: list[int]) -> float:
    """Milliseconds until the answer of one token is here."""
    began = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    reply = client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=120)
    reply.raise_for_status()
    return (time.perf_counter() - began) * 1e3


def attack(url: str, spy: str, args: argparse.Namespace, seed: int) -> tuple[list[float], list[float]]:
    """Times of prompts that the victim asked, and of fresh ones, in random order."""
    chance = random.Random(seed)
    times: tuple[list[float], list[float]] = ([], [])
    with httpx.Client(base_url=url) as client:
        for trial in range(-3, args.trials):  # the first ones warm up
            prompt, other = ([chance.randrange(300, 4000) for _ in range(args.prompt_tokens)] for _ in range(2))
            is_fresh = chance.random() < 0.5
            ask(client, VICTIM, other if is_fresh else prompt)
            took_ms = ask(client, spy, prompt)
            if trial >= 0:
                times[is_fresh].append(took_ms)
    return times


def main() -> int:
    """Attack and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--port", type=int, default=0, help="of the server; default: any")
    args = parser.parse_args()
    facts, rows, found = machine(), [], {}
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.yaml"
        keys.write_text(KEYS)
        with served(
            Path(folder) / "log", port=args.port, environment={"TWOSTROKE__ROUTER__API_KEY_FILE": str(keys)}
        ) as url:
            for seed, (name, spy) in enumerate((("across", ATTACKER), ("within", COLLEAGUE))):
                asked, fresh = attack(url, spy, args, seed)
                low, high = interval(asked, fresh, seed)
                found[name] = {"auc": auc(asked, fresh), "low": low, "high": high, "asked_ms": asked, "fresh_ms": fresh}
                rows.append([name, f"{found[name]['auc']:.3f}", f"{low:.3f}-{high:.3f}", len(asked), len(fresh)])
                print(*rows[-1], flush=True)
    body = f"Prompts of {args.prompt_tokens} tokens.\n\n" + table(["keys", "AUC", "95 %", "asked", "fresh"], rows)
    print(body, save("isolation", "Times across tenants", body, found, facts), sep="\n")
    is_met = found["across"]["high"] <= MOST_ACROSS and found["within"]["auc"] >= LEAST_WITHIN
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
