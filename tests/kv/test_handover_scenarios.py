"""Runs the transcripts under tests/scenarios/handover: events in, actions out, one file per behaviour.

A transcript opens with facts (`prompt 40`, `held 16`, `slots 2`, `frame 16`; `shared 1`: decode offers shared memory
and prefill takes it; `required 1`: decode takes nothing less; `windows 64`: before that token windowed layers are left
out). Then it has events, each with every action that must follow, indented; `= state` at the end of them checks the
state:

    decode  0.10  hears frame [16,32) damaged
        send #4 refetch [16,32) attempt=1
        send #5 slot_free 1
        = receiving

Sides are `decode` (Receiver) and `prefill` (Sender). What is heard takes the next sequence, unless `#7` says otherwise,
and the epoch 1.5, unless `epoch=1.4` does.
"""

import re
from pathlib import Path

import pytest
from support.session.recorded import Recorded

from twostroke.core.lease import HANDOVER_LEASE
from twostroke.core.request import Epoch
from twostroke.kv.handover.machine import Abort, Action, Close, GotFirstToken, Label, Lost, Read, Send, SendFrame, Write
from twostroke.kv.handover.receiver import FrameArrived, Receiver
from twostroke.kv.handover.sender import Sender
from twostroke.protos import common_pb2
from twostroke.protos import handover_pb2 as pb

SCENARIOS = sorted((Path(__file__).parents[1] / "scenarios" / "handover").glob("*.txt"))
LABEL = Label("r1", 0, Epoch(1, 5))
FACTS = {"prompt": 40, "held": 0, "slots": 4, "frame": 16, "timeout_s": 60, "shared": 0, "required": 0, "windows": 0}


def test_there_are_transcripts():
    assert len(SCENARIOS) >= 12


@pytest.mark.parametrize("path", SCENARIOS, ids=[path.stem for path in SCENARIOS])
def test_transcript(path: Path, recorded: Recorded):
    recorded.check_transcript(path, Stage())


class Stage:
    """Both machines, and the numbers of what they hear."""

    def __init__(self):
        self.facts = dict(FACTS)
        self.machine = None
        self.machine_by_side = {}
        self.heard = {"decode": 0, "prefill": 0}

    def play(self, line: str) -> list[str]:
        words = line.split()
        if words[0] in self.facts:
            self.facts[words[0]] = int(words[1])
            return []
        side, now_s, event, *rest = words
        now_s = float(now_s)
        if side == "decode" and side not in self.machine_by_side:
            order = self.order()
            self.machine_by_side[side] = Receiver(LABEL, order, HANDOVER_LEASE, now_s + self.facts["timeout_s"], now_s)
        if event == "hears":
            actions = self.hear(side, rest, now_s)
        else:
            self.machine = self.machine_by_side[side]
            given = [pb.FirstToken(token_id=int(rest[0]))] if event == "first_token" else map(argument, numbers(rest))
            actions = getattr(self.machine, event)(*given, now_s)
        return [render(action) for action in actions]

    def state(self) -> str:
        return str(self.machine.state)

    def hear(self, side: str, words: list[str], now_s: float) -> list[Action]:
        text = " ".join(words)
        given = re.search(r"#(\d+)", text)
        sequence = int(given[1]) if given else self.heard[side] + 1
        self.heard[side] = max(self.heard[side], sequence)
        epoch = re.search(r"epoch=(\d+)\.(\d+)", text)
        label = Label(LABEL.request_id, 0, Epoch(int(epoch[1]), int(epoch[2]))) if epoch else LABEL
        words = [word for word in words if not word.startswith(("#", "epoch="))]
        kind, rest = words[0], words[1:]
        if kind == "open":
            message = label.up(sequence, self.order())
            if side not in self.machine_by_side:
                sender = Sender(message, self.facts["frame"], 8, HANDOVER_LEASE, now_s)
                self.machine = self.machine_by_side[side] = sender
                if self.facts["shared"]:
                    sender.share(self.facts["slots"], self.facts["frame"])
                return []
        self.machine = self.machine_by_side[side]
        if kind == "frame":
            start, count, *slot = numbers(rest)
            intact = {"ok": True, "damaged": False}[rest[1]]
            arrived = FrameArrived(label, sequence, start, count, intact, 1000, slot=slot[0] if slot else None)
            return self.machine.on_frame(arrived, now_s)
        make = label.up if side == "prefill" else label.down
        return self.machine.on_message(make(sequence, self.body(kind, rest)), now_s)

    def body(self, kind: str, words: list[str]):
        if kind == "open":
            return self.order()
        if kind == "failed":
            return common_pb2.Error(code=words[0], message="told so")
        if kind == "cancel":
            return pb.Cancel(reason=words[0])
        if kind == "slot_free":
            count, *slots = numbers(words)
            return pb.SlotFree(count=count, slots=slots)
        if kind == "started" and len(words) > 1:
            return pb.Started(cached_tokens=int(words[0]), transport=words[1].removeprefix("transport="))
        given = numbers(words)
        shapes = {
            "bind": (pb.Bind, ()),
            "not_yet": (pb.NotYet, ()),
            "verified": (pb.Verified, ("upto_token",)),
            "refetch": (pb.Refetch, ("token_start", "token_count", "attempt")),
            "beat": (pb.HandoverBeat, ()),
            "started": (pb.Started, ("cached_tokens",)),
            "first_token": (pb.FirstToken, ("token_id",)),
            "done": (pb.Done, ("num_frames",)),
        }
        message, names = shapes[kind]
        return message(**dict(zip(names, given, strict=True)))

    def order(self) -> pb.Open:
        facts = self.facts
        prompt = range(facts["prompt"])
        timeout_ms = facts["timeout_s"] * 1000
        memory = pb.SharedMemory(slots=facts["slots"], slot_bytes=4096) if facts["shared"] else None
        return pb.Open(
            prompt_ids=prompt,
            held_tokens=facts["held"],
            frame_slots=facts["slots"],
            timeout_ms=timeout_ms,
            shared_memory=memory,
            required_transport="shm" if facts["required"] else "",
            windows_from=facts["windows"],
        )


def argument(value):
    return common_pb2.Error(code=value, message="told so") if value in ("overloaded", "non_finite_kv") else value


def numbers(words: list[str]) -> list:
    """`[16,40)` is start 16 and count 24; `3`, `cached=3` is 3; `late` stays a word."""
    found = []
    for word in words:
        span = re.fullmatch(r"\[(\d+),(\d+)\)", word)
        number = re.fullmatch(r"(?:\w+=)?(\d+)", word)
        if span:
            found += [int(span[1]), int(span[2]) - int(span[1])]
        elif number:
            found.append(int(number[1]))
        elif word not in ("ok", "damaged"):
            found.append(word)
    return found


def span_of(start: int, count: int) -> str:
    return f"[{start},{start + count})"


def slot_of(slot: int | None) -> str:
    return "" if slot is None else f" slot={slot}"


def render(action: Action) -> str:
    match action:
        case Send(message):
            kind = message.WhichOneof("body")
            body = getattr(message, kind)
            words = {
                "open": lambda: f" held={body.held_tokens} of {len(body.prompt_ids)}",
                "refetch": lambda: f" {span_of(body.token_start, body.token_count)} attempt={body.attempt}",
                "verified": lambda: f" {body.upto_token}",
                "slot_free": lambda: f" {body.count}" + "".join(f" slot={slot}" for slot in body.slots),
                "cancel": lambda: f" {body.reason}",
                "started": lambda: f" cached={body.cached_tokens}" + " shm" * (body.transport == "shm"),
                "first_token": lambda: f" {body.token_id}",
                "done": lambda: f" frames={body.num_frames} bytes={body.bytes_sent}",
                "failed": lambda: f" {body.code}",
            }.get(kind, str)()
            return f"send #{message.sequence} {kind}{words}"
        case SendFrame(sequence, start, count, is_last, slot):
            return f"frame #{sequence} {span_of(start, count)}{' last' * is_last}{slot_of(slot)}"
        case Write(sequence, start, count):
            return f"write #{sequence} {span_of(start, count)}"
        case Read(start, count, slot):
            return f"read {span_of(start, count)}{slot_of(slot)}"
        case GotFirstToken(token_id):
            return f"first token {token_id}"
        case Lost(reason, upto, first_token, _, code, _):
            return f"lost {reason} stored={upto} first_token={first_token}{' ' * bool(code)}{code}"
        case Abort(reason, _):
            return f"abort {reason}"
        case Close(now):
            return "close now" if now else "close"
    return re.sub(r"(?<=.)(?=[A-Z])", "_", type(action).__name__).lower()
