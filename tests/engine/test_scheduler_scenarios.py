"""Runs the transcripts of the scheduler and both policies: commands in, events and plans out, one file per behaviour.

A transcript opens with facts (`pool 8 blocks of 16`, `policy combined`, `seqs 8`, `batch 64`, `waiting 10`, `swap 0`:
host blocks, `watermark 200`: percent of the pool that decode promises, `context 512`, `scored 64`: prompt rows per step
whose logprobs are wanted, `guess 4`: most guessed tokens, of which `wrong 7`: every 7th is wrong), then has commands,
each with everything that must come of it, indented:

    submit a local 40 max=4          # like=b:32 shares b's first 32 tokens, generated ones too; scored=0, emitted=, …
    step                             # tick, plan, apply; `step 3`: thrice; `quiet 3`: without a word; `broken`: fails
    spoil b                          # what b copies back next is damaged
        promised a held=0
        plan a[0,40)*                # computed positions; * samples; +3: and three guessed tokens
        tokens a#0                   # a#1..3: three tokens
    at 2.5                           # the clock
    = a decoding | free 5, promised 0

The prompt of each name is its own; the k-th generated token of a sequence is end-of-text where `eos=k` says so.
"""

from pathlib import Path

import pytest
from support.session.recorded import Recorded

from twostroke.core.request import FinishReason, SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import (
    AskSnapshot,
    Bind,
    BlocksFetched,
    Bound,
    CacheDelta,
    CacheSnapshot,
    CancelSequence,
    Ended,
    FetchBlocks,
    KvComplete,
    KvRead,
    NotYet,
    Offered,
    PeerBound,
    PeerNotYet,
    PrefillLocally,
    Progress,
    Promised,
    ReadKv,
    Release,
    Source,
    StepTokens,
    Stop,
    Submit,
    WriteKv,
)
from twostroke.engine.plan import StepResult
from twostroke.engine.policy import StepLimits
from twostroke.engine.speculation.speculation import Speculation
from twostroke.engine.store_ops import FetchOp, ReadOp, SwapInOp, SwapOutOp, WriteOp
from twostroke.kv.block import chain
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.prefill_worker.policy import prefill_policy

FACTS = {
    "pool": 8,
    "block": 16,
    "policy": "combined",
    "watermark": 0,  # percent of the pool that decode promises; 0: as usual
    "seqs": 8,
    "batch": 64,
    "waiting": 10,
    "swap": 0,
    "context": 512,
    "scored": 64,
    "guess": 0,
    "wrong": 0,
}

FOLDER = Path(__file__).parents[1] / "scenarios"
SCENARIOS = sorted(p for part in ("schedule", "prefill_policy", "decode_policy") for p in (FOLDER / part).glob("*.txt"))
POLICIES = {"prefill": prefill_policy, "decode": decode_policy, "combined": combined_policy}
EOS, KEY, ROOT = 1, b"cluster", b"root"


def test_there_are_transcripts():
    assert len(SCENARIOS) >= 20


@pytest.mark.parametrize("path", SCENARIOS, ids=[f"{path.parent.name}/{path.stem}" for path in SCENARIOS])
def test_transcript(path: Path, recorded: Recorded):
    recorded.check_transcript(path, Stage())


class Stage:
    def __init__(self):
        self.facts = dict(FACTS)
        self.core = None
        self.now_s = 0.0
        self.prompts, self.eos = {}, {}
        self.spoiled = set()

    def play(self, line: str) -> list[str]:
        word, *rest = line.split()
        if self.core is None and word in self.facts:
            if word == "pool":
                rest, self.facts["block"] = rest[:1], int(rest[-1])
            self.facts[word] = rest[0] if word == "policy" else int(rest[0])
            return []
        if self.core is None:
            self.pool = BlockPool(self.facts["pool"], self.facts["block"])
            prefix = PrefixCache(self.pool)
            limits = CoreLimits(self.facts["context"], self.facts["swap"], self.facts["scored"])
            most = self.facts["guess"]
            speculation = Speculation(lambda key, _: Guesser(self, key), most) if most else None
            self.core = EngineCore(
                limits, self.pool, prefix, self.policy(), eos_ids=[EOS], key=KEY, speculation=speculation
            )
        out = self.do(word, rest)
        self.core.check_integrity()
        return [text for item in out for text in ([item] if isinstance(item, str) else said(item))]

    def policy(self):
        facts = self.facts
        limits = StepLimits(facts["seqs"], facts["batch"], facts["waiting"], max(2000, 3 * facts["context"]))
        if facts["watermark"]:
            return decode_policy(limits, watermark=facts["watermark"] / 100)
        return POLICIES[facts["policy"]](limits)

    def do(self, word: str, rest: list[str]) -> list:
        names = [w for w in rest if "=" not in w]
        values = dict(w.split("=") for w in rest if "=" in w)
        if word == "at":
            self.now_s = float(names[0])
            return []
        if word == "policy":
            self.facts |= {"policy": names[0], **{name: int(value) for name, value in values.items()}}
            self.core.set_policy(self.policy())
            return []
        if word in ("step", "broken"):
            times = int(names[0]) if names and word == "step" else 1
            return [item for _ in range(times) for item in self.step(fails=word == "broken")]
        if word == "quiet":
            for _ in range(int(names[0])):
                self.step(fails=False)
            return []
        if word == "spoil":
            self.spoiled.add(SequenceKey(names[0], 0))
            return []
        if word == "tick":
            return self.core.tick(self.now_s)
        return self.core.handle(self.command(word, names, values), self.now_s)

    def command(self, word: str, names: list[str], values: dict[str, str]):
        key = SequenceKey(names[0], 0) if names else None
        if word == "submit":
            return self.submit(key, names, values)
        start, _, count = (names[1] if len(names) > 1 else "").partition("+")
        match word:
            case "bind":
                return Bind(key)
            case "write":
                return WriteKv(key, int(start), int(count), ())
            case "read":
                return ReadKv(key, int(start), int(count))
            case "complete":
                return KvComplete(key, int(values["first"]))
            case "locally":
                first = int(values["first"]) if "first" in values else None
                return PrefillLocally(key, int(values["kept"]), first)
            case "peer_bound":
                return PeerBound(key)
            case "peer_not_yet":
                return PeerNotYet(key)
            case "release":
                return Release(key)
            case "cancel":
                return CancelSequence(key, FinishReason(values.get("reason", "cancelled")))
            case "fetch":
                first = int(start)
                identities = chain(KEY, ROOT, self.prompts[key.request_id])
                root = values.get("root", "").encode() or ROOT
                return FetchBlocks(1, tuple(identities[first // 16 : (first + int(count)) // 16]), first, root)
            case "snapshot":
                return AskSnapshot()
            case "stop":
                return Stop()
        raise AssertionError(f"no such command: {word}")

    def submit(self, key, names, values) -> Submit:
        name, source, length = key.request_id, names[1], int(names[2])
        prompt = [1000 * ord(name[0]) + 100 * len(name) + place for place in range(length)]
        if "like" in values:
            other, _, shared = values["like"].partition(":")
            prompt[: int(shared)] = self.prompts[other][: int(shared)]
        self.prompts[name] = prompt
        if "eos" in values:
            self.eos[key] = int(values["eos"])
        return Submit(
            key=key,
            source=Source[source.upper()],
            prompt_ids=tuple(prompt),
            identities=tuple(chain(KEY, ROOT, prompt)),
            identity_root=ROOT,
            params=SamplingParams(
                max_tokens=int(values.get("max", 100)),
                min_tokens=int(values.get("min", 0)),
                prompt_logprobs=int(values["scored"]) if "scored" in values else None,
            ),
            num_emitted=int(values.get("emitted", 0)),
            priority=int(values.get("priority", 0)),
            deadline_s=float(values["deadline"]) if "deadline" in values else None,
        )

    def step(self, *, fails: bool) -> list:
        out = self.core.tick(self.now_s)
        for key in [op.key for op in out if isinstance(op, SwapInOp) and op.key in self.spoiled]:
            self.spoiled.discard(key)
            out += self.core.swap_failed(key)
        plan = self.core.plan(self.now_s)
        out += self.core.drain()
        if plan is None:
            return [*out, "plan nothing"]
        parts = [
            f"{s.key.request_id}[{s.start},{s.end}){'*' if s.samples else ''}"
            + (f"+{len(s.draft_ids)}" if s.draft_ids else "")
            for s in plan.sequences
        ]
        out.append("plan " + " ".join(parts))
        if fails:
            return out + self.core.fail_step(plan, "internal_error", "boom")
        tokens = tuple(self.sampled(s) if s.samples else () for s in plan.sequences)
        for sequence, sampled in zip(plan.sequences, tokens, strict=True):
            self.prompts[sequence.key.request_id] += sampled
        return out + self.core.apply(plan, StepResult(plan.step, tokens), self.now_s)

    def sampled(self, step) -> tuple[int, ...]:
        """The token of the last row, and of the rows of guesses that are right."""
        found = [self.token(step.key, step.num_generated, step.end)]
        for place, draft in enumerate(step.draft_ids, 1):
            if draft != found[-1]:
                break
            found.append(self.token(step.key, step.num_generated + place, step.end + place))
        return tuple(found)

    def token(self, key, num_generated: int, place: int) -> int:
        return EOS if self.eos.get(key) == num_generated else 50_000 + place

    def state(self) -> str:
        states = ", ".join(f"{key.request_id} {state.name.lower()}" for key, state in self.core.states().items())
        promised = self.core.load(self.now_s).promised_blocks
        load = dict(self.core.load(self.now_s).counters)
        host = f", swapped {load['swap_blocks_in_use']}" if "swap_blocks" in load else ""
        return f"{states or 'nothing'} | free {self.pool.num_free}, promised {promised}{host}"


class Guesser:
    """Guesses what the stage will say, but for every `wrong`-th token."""

    def __init__(self, stage: Stage, key: SequenceKey):
        self.stage, self.key = stage, key

    def propose(self, tokens, most):
        num_generated, wrong = self.stage.core._scheduler.by_key[self.key].num_generated, self.stage.facts["wrong"]
        return tuple(
            7
            if wrong and (len(tokens) + n) % wrong == 0
            else self.stage.token(self.key, num_generated + n, len(tokens) + n)
            for n in range(most)
        )


def numbered(news) -> str:
    """Name and numbers of new tokens."""
    last = news.first_index + len(news.token_ids) - 1
    more = f"..{last}" if last > news.first_index else ""
    return f"{news.key.request_id}#{news.first_index}{more}"


def said(item) -> list[str]:
    """An event or operation in words."""
    name = item.key.request_id if hasattr(item, "key") else ""
    match item:
        case Promised():
            return [f"promised {name} held={item.held_tokens}"]
        case Offered():
            return [f"offered {name} cached={item.cached_tokens}"]
        case Bound():
            return [f"bound {name}"]
        case NotYet():
            return [f"not_yet {name}"]
        case Progress():
            return [f"progress {name} {item.num_computed}{' began' if item.began else ''}"]
        case StepTokens():
            return ["tokens " + " ".join(map(numbered, item.news))]
        case Ended():
            preempted = f" preempted={item.preemptions}" if item.preemptions else ""
            cached = f" cached={item.cached_tokens}" if item.cached_tokens else ""
            return [f"ended {name} {item.error_code or item.reason.value}{cached}{preempted}"]
        case CacheDelta():
            return [f"cache #{item.sequence} +{len(item.stored)} -{len(item.removed)}"]
        case CacheSnapshot():
            return [f"snapshot #{item.sequence} of {len(item.identities)}"]
        case KvRead():
            return [f"no kv {name} {item.token_start}+{item.token_count}"]
        case BlocksFetched():
            return [f"fetched {item.num_blocks}"]
        case ReadOp():
            return [f"read {name} {item.token_start}+{item.token_count} from {len(item.block_table)} blocks"]
        case WriteOp():
            return [f"write {name} {item.token_start}+{item.token_count} into {len(item.block_table)} blocks"]
        case SwapOutOp() | SwapInOp():
            way = "swap_out" if isinstance(item, SwapOutOp) else "swap_in"
            return [f"{way} {name} {item.token_start}+{item.token_count}"]
        case FetchOp():
            return [f"fetch {item.token_start}+{item.token_count}"]
    raise AssertionError(f"no words for {item}")
