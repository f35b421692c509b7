"""Runs the transcripts under tests/scenarios/router: events in, decisions out, one file per behaviour.

Each line is an event; what must follow stands below it, indented. `0.50` at the start of a line is the time in seconds.

    announced p0 prefill #1      a worker of that role and incarnation (seqs=16 blocks=1000 numerics=x tp=1 codec=1)
    up p0 | down p0 | beat p0 run 7 | load p0 queued=100 running=3 a=0.5 | leaving p0 | ended p0 | tick
    gpu p0 throttled 3.0 hot     a report on its GPU: verdict, slowdown, reasons;  cordoned: GPUs that were given up
    states                       who stands where
    held p0=10 d0=5              hash blocks of the next prompts that workers hold
    choose r1 1600 max=100       the winner, its terms, and the ranked peers; `all` lists every candidate
    dispatch                     count the last choice as under way;  first r1: its first token;  over r1: its end
    limits requests=2 ...        of admission;  offer r1 tenant 1000;  release r1;  cancel r1;  retry;  counts
    stream 2                     a request of two choices;  send 1: under epoch 1;  tokens 0 @1 0+3;  end 0 @1 stop
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.session.recorded import Recorded

from twostroke.core.errors import TwostrokeError
from twostroke.core.request import Epoch, FinishReason, Role, SequenceKey
from twostroke.kv.spec import attention_spec
from twostroke.router.requests.admission.bounds import Admission, AdmissionLimits, Offer
from twostroke.router.requests.delivery import Delivery
from twostroke.router.routing.candidates import Candidate, PolicyLimits, RequestFacts, RoutingDecision
from twostroke.router.routing.facts import GpuFacts, LoadFacts, ModelFacts, WorkerFacts, WorkerKey
from twostroke.router.routing.fleet import Fleet, FleetChange
from twostroke.router.routing.policy import choose
from twostroke.router.routing.views import count_work, views_of

SCENARIOS = sorted((Path(__file__).parents[2] / "scenarios" / "router").glob("*.txt"))
SHORT = {
    "a": "prefill_ms_per_token",
    "b": "prefill_ms_per_token_pair",
    "step": "decode_step_ms",
    "bandwidth": "handover_bytes_per_s",
    "queued": "queued_prefill_tokens",
    "free": "free_blocks",
}


def test_there_are_transcripts() -> None:
    assert len(SCENARIOS) >= 12


@pytest.mark.parametrize("path", SCENARIOS, ids=[path.stem for path in SCENARIOS])
def test_transcript(path: Path, recorded: Recorded) -> None:
    recorded.check_transcript(path, Stage())


class Stage:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.fleet = Fleet()
        self.keys: dict[str, WorkerKey] = {}
        self.held: dict[str, int] = {}
        self.policy = PolicyLimits()
        self.admission = Admission()
        self.delivery = Delivery(1)
        self.last: tuple[RequestFacts, RoutingDecision] | None = None

    def play(self, line: str) -> list[str]:
        words = line.split()
        if re.fullmatch(r"\d+\.\d+", words[0]):
            self.now_s = float(words.pop(0))
        verb, args = words[0], [word for word in words[1:] if "=" not in word]
        fields = dict(word.split("=") for word in words[1:] if "=" in word)
        answer = getattr(self, f"on_{verb}")(*args, **fields)
        return [_change(a) if isinstance(a, FleetChange) else a for a in answer or []]

    def state(self) -> str:
        return self.on_states()[0]

    # ---------------------------------------------------------------- fleet

    def on_announced(
        self, name, role, incarnation, *, seqs="16", blocks="1000", numerics="x", knows="", tp="1", codec="1"
    ):
        spec = attention_spec(2, 4, 16, int(codec))
        model = ModelFacts("m", b"f" * 16, numerics.encode(), "", 4096, 1000, True, "", 1000, spec)
        number = int(incarnation.removeprefix("#"))
        facts = WorkerFacts(name, number, Role(role), f"{name}:1", model, int(blocks), 16, int(seqs), 2048)
        facts = replace(facts, capabilities=tuple(knows.split(",")), num_ranks=int(tp))
        changes = self.fleet.announced(facts, self.now_s)
        self.keys[name] = facts.key
        return changes

    def on_up(self, *names):
        for name in names:
            self.fleet.session_up(self.keys[name], None, self.now_s)

    def on_down(self, name):
        return self.fleet.session_down(self.keys[name], self.now_s, "stream broke")

    def on_beat(self, name, phase=None, steps=None):
        self.fleet.beat(self.keys[name], self.now_s, phase, None if steps is None else int(steps))

    def on_load(self, name, **fields):
        values = {SHORT.get(k, k): (float(v) if "." in v or "e" in v else int(v)) for k, v in fields.items()}
        worker = self.fleet.get(name)
        values = {"free_blocks": worker.facts.num_kv_blocks, **values}
        values["draining"] = bool(values.get("draining", False))
        self.fleet.loaded(self.keys[name], LoadFacts(**values), worker.role, self.now_s)

    def on_gpu(self, name, verdict, slowdown="0", *reasons):
        worker = self.fleet.get(name)
        gpu = GpuFacts(f"GPU-{name}", verdict=verdict, slowdown=float(slowdown), reasons=reasons)
        self.fleet.loaded(self.keys[name], replace(worker.load, gpus=(gpu,)), worker.role, self.now_s)

    def on_cordoned(self):
        found = self.fleet.cordoned.all()
        return [f"{c.gpu.uuid} of {c.worker_id} at {c.at_s:g} s: {' '.join(c.gpu.reasons)}" for c in found] or ["none"]

    def on_leaving(self, name):
        self.fleet.leaving(self.keys[name])

    def on_ended(self, name):
        return self.fleet.announce_ended(self.keys[name], self.now_s)

    def on_tick(self):
        return self.fleet.tick(self.now_s)

    def on_states(self):
        return [", ".join(f"{w.facts.worker_id} {w.state.value}" for w in self.fleet) or "nobody"]

    def on_work(self, name):
        w = self.fleet.get(name)
        return [f"queued {w.queued_prefill_tokens}, decoding {w.num_decoding}, room {w.free_kv_tokens}"]

    # ---------------------------------------------------------------- policy

    def on_held(self, **fields):
        self.held = {name: int(blocks) for name, blocks in fields.items()}

    def on_policy(self, **fields):
        self.policy = PolicyLimits(local_prefill=fields["local"] == "yes")

    def on_choose(self, name, prompt, *flags, max="100", n="1"):
        facts = RequestFacts(name, int(prompt), int(max), int(n))
        choice = choose(facts, views_of(self.fleet.serving("m")), self.held, self.policy)
        if choice is None:
            return ["nobody"]
        self.last = (facts, choice)
        shown = choice.candidates if "all" in flags else (choice.winner,)
        peers = [f"peers {' '.join(p.worker_id for p in choice.prefill_peers)}"] if choice.prefill_peers else []
        reason = [f"because {choice.reason}"] if "why" in flags else []
        refused = [f"not {r.prefill} > {r.decode}: {r.field}: {r.reason}" for r in choice.refused]
        return [*(_candidate(c, c is choice.winner) for c in shown), *peers, *reason, *refused]

    def on_spread(self, prompt, count):
        """Many requests, each forgotten at once: who wins how often."""
        wins: dict[str, int] = {}
        for number in range(int(count)):
            facts = RequestFacts(f"s{number}", int(prompt), 100)
            choice = choose(facts, views_of(self.fleet.serving("m")), self.held, self.policy)
            wins[choice.winner.name] = wins.get(choice.winner.name, 0) + 1
        least = int(count) // len(wins) // 2
        return [f"{name}: {'often' if wins[name] >= least else 'rarely'}" for name in sorted(wins)]

    def on_dispatch(self):
        facts, choice = self.last
        for index in range(facts.num_choices):
            count_work(self.fleet, facts, index, choice, self.now_s, is_leading=index == 0)

    def on_first(self, name):
        self.fleet.first_token(SequenceKey(name, 0))

    def on_over(self, name):
        self.fleet.ended(SequenceKey(name, 0))

    # ---------------------------------------------------------------- admission

    def on_limits(self, requests="512", tokens="2000000"):
        self.admission = Admission(AdmissionLimits(int(requests), int(tokens)))

    def on_offer(self, name, tenant, tokens):
        return self._typed(lambda: self.admission.offer(Offer(name, tenant, int(tokens), 60.0), self.now_s))

    def on_deadline(self, first_ms, alone_ms, timeout_s):
        return self._typed(lambda: self.admission.check_deadline(float(first_ms), float(alone_ms), float(timeout_s)))

    def on_release(self, name):
        self.admission.release(name, self.now_s)

    def on_cancel(self, name):
        self.admission.release(name, self.now_s, cancelled=True)

    def on_reject(self, name):
        self.admission.reject(name, self.now_s)

    def on_retry(self, count="1"):
        granted = sum(self.admission.may_retry() for _ in range(int(count)))
        return [f"{granted} of {count}"]

    def on_counts(self):
        a = self.admission
        assert a.offered == a.accepted + a.rejected + a.cancelled
        return [
            f"offered {a.offered} = accepted {a.accepted} + rejected {a.rejected} + cancelled {a.cancelled}; "
            f"{len(a)} under way with {a.tokens} tokens"
        ]

    def _typed(self, act):
        try:
            act()
        except TwostrokeError as error:
            advice = f", retry in {error.retry_after_s:.1f} s" if error.retry_after_s else ""
            return [f"{error.code}: {error.message}{advice}"]
        return ["taken"]

    # ---------------------------------------------------------------- delivery

    def on_stream(self, choices):
        self.delivery = Delivery(int(choices))

    def on_send(self, counter):
        return [f"choices {' '.join(map(str, self.delivery.dispatch(Epoch(1, int(counter)))))}"]

    def on_tokens(self, choice, epoch, place):
        first, count = place.split("+")
        return [self.delivery.tokens(int(choice), _epoch(epoch), int(first), [7] * int(count)).value]

    def on_end(self, choice, epoch, reason):
        return [self.delivery.end(int(choice), _epoch(epoch), FinishReason(reason)).value]

    def on_cursor(self):
        d = self.delivery
        return [f"{d.completion_tokens} tokens, unfinished {list(d.unfinished)}"]


def _epoch(word: str) -> Epoch:
    return Epoch(1, int(word.removeprefix("@")))


def _change(change: FleetChange) -> str:
    return f"{change.change.value} {change.worker.worker_id} #{change.worker.incarnation}: {change.reason}"


def _candidate(c: Candidate, wins: bool) -> str:
    t, mark = c.terms, "* " if wins else ""
    return (
        f"{mark}{c.name}: {t.total_ms:.1f} = queue {t.prefill_queue_ms:.1f} + prefill {t.prefill_ms:.1f} "
        f"+ transfer {t.transfer_ms:.1f} + queue {t.decode_queue_ms:.1f} + load penalty {t.load_penalty_ms:.1f}"
        + (f" + throttled {t.throttle_ms:.1f}" if t.throttle_ms else "")
    )
