"""Step plans as differences, for ranks of another process: a sequence whole once, then only its changes. Pure.

    scheduler ─ StepPlan ─▶ PlanSender ─ bytes ─┬─▶ PlanReceiver (rank 1) ─ StepPlan ─▶ runner
                                                └─▶ PlanReceiver (rank 2) ─ StepPlan ─▶ runner

Sender and receiver remember the last step of each sequence. From it both derive the same expected next step
(`expected_step`): one more token at the end, one more generated, the same blocks. A message carries

    rows       a slot number per sequence, in the plan's order
    tokens     the id of each expected one
    grown      blocks that were added at the end of a table, with their generations
    changed    fields in which a step differs from the expected one
    whole      steps of sequences that the receiver does not know
    gone       slots that are free again: their sequence was in no plan for `MAX_ABSENT_STEPS`

and if all sequences are those of the message before, and expected, only their tokens and the blocks that were added
(`Steady`). So a step of 128 decoding sequences costs half a kilobyte, however long they are. The idea is that of vLLM's
`SchedulerOutput` (new requests in full, cached ones by their changes). Messages are numbered: a receiver that missed
one says so, and the sender starts again with whole sequences (`reset`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.request import SequenceKey
from ...kv.block import BlockId
from ..plan import History, SequenceStep, StepPlan
from .steady import STEADY, Steady
from .wire import WireError, decode, encode

MAX_ABSENT_STEPS = 32  # a sequence that was preempted may come back; its slot is kept for so many messages

_FIELDS = SequenceStep._fields


class PlanGap(WireError):
    """A message is missing before this one. The sender must `reset`; the next message is understood again."""


@dataclass(slots=True)
class _Known:
    """The last step of a sequence."""

    slot: int
    step: SequenceStep
    message: int  # number of the message that brought it


def expected_step(
    last: SequenceStep, token_id: int, blocks: tuple[BlockId, ...] = (), uses: tuple[int, ...] = ()
) -> SequenceStep:
    """The next step of a decoding sequence: computes `token_id`, over the same blocks and those that were added."""
    key, start, ids, table, generations, _, params, number, _, _, adapter, _, history, _ = last
    if blocks:
        table += blocks
    if uses:
        generations += uses
    if history is not None:
        history = History(history.prompt_ids, (*history.output_ids, token_id))
    # By keywords this takes three times as long, and a step has one per sequence.
    rest = (False, None, adapter, (), history, ())
    return SequenceStep._make((key, start + len(ids), (token_id,), table, generations, True, params, number + 1, *rest))


def _is_expected(step: SequenceStep, last: SequenceStep) -> bool:
    """True if `step` is surely `expected_step` after `last`, for its own token and without new blocks.

    Compares objects by identity: a decoding sequence keeps its blocks and parameters from step to step.
    """
    _, start, ids, table, uses, samples, params, number, tail, place, adapter, drafts, history, targets = step
    _, last_start, last_ids, last_table, last_uses, _, last_params, last_number, _, _, last_adapter, _, past, _ = last
    return (
        table is last_table
        and uses is last_uses
        and params is last_params
        and start == last_start + len(last_ids)
        and number == last_number + 1
        and len(ids) == 1
        and samples
        and place is None
        and adapter == last_adapter
        and not (tail or drafts or targets)
        and (history is past is None or _is_next(history, past, ids[0]))
    )


def _is_next(history: History | None, past: History | None, token_id: int) -> bool:
    if history is None or past is None:
        return False
    outputs = history.output_ids
    return history.prompt_ids is past.prompt_ids and outputs[-1:] == (token_id,) and outputs[:-1] == past.output_ids


class PlanSender:
    """Turns plans into messages. One sender serves any number of receivers: all get the same bytes."""

    def __init__(self) -> None:
        self._message = 0
        self._known: dict[SequenceKey, _Known] = {}
        self._free: list[int] = []
        self._num_slots = 0
        self._is_whole = True
        self._last: list[_Known] = []  # sequences of the last message
        self._steady = Steady()

    def reset(self) -> None:
        """Make the next message understandable without the ones before it."""
        self._known.clear()
        self._free.clear()
        self._last = []
        self._steady.set(())
        self._num_slots = 0
        self._is_whole = True

    def encode(self, plan: StepPlan) -> bytes:
        """The message of a plan. Receivers must get every message, in order."""
        assert not plan.states, "recurrent states are not sent to other ranks"
        self._message += 1
        data = None if self._is_whole else self._steady.put(self._message, plan)
        return self._put(plan) if data is None else data

    def _put(self, plan: StepPlan) -> bytes:
        for before, step in zip(self._last, self._steady.steps, strict=True):  # what steady messages have changed
            before.step, before.message = step, self._message - 1
        rows = []
        tokens: list[int] = []
        grown: list[int] = []  # slot, number of blocks, the blocks, their generations
        changed: list[object] = []
        whole: list[object] = []
        gone = self._forget()
        find, message = self._known.get, self._message
        for step in plan.sequences:
            known = find(step[0])
            if known is None:
                known = self._known[step.key] = _Known(self._take_slot(), step, message)
                whole += (known.slot, step)
            elif _is_expected(step, known.step):
                tokens.append(step[2][0])
                known.step, known.message = step, message
            else:
                self._put_changes(known, step, tokens, grown, changed)
                known.step, known.message = step, message
            rows.append(known)
        slots = tuple([known.slot for known in rows])
        parts = (slots, tuple(tokens), tuple(grown), tuple(changed), tuple(whole), gone)
        data = encode((message, self._is_whole, plan.step, *parts))
        self._is_whole, self._last = False, rows
        self._steady.set(plan.sequences)
        return data

    def _put_changes(
        self, known: _Known, step: SequenceStep, tokens: list[int], grown: list[int], changed: list[object]
    ) -> None:
        last, token_id = known.step, step.token_ids[0] if step.token_ids else 0
        tokens.append(token_id)
        more = len(step.block_table) - len(last.block_table)
        blocks: tuple[BlockId, ...] = ()
        uses: tuple[int, ...] = ()
        pairs = ((step.block_table, last.block_table), (step.generations, last.generations))
        if more > 0 and all(now[: len(before)] == before for now, before in pairs):
            blocks, uses = step.block_table[-more:], step.generations[len(last.generations) :]
            grown += (known.slot, more, *blocks, *uses)
        expected = expected_step(last, token_id, blocks, uses)
        if step == expected:
            return
        named = zip(_FIELDS, step, expected, strict=True)
        fields = {name: value for name, value, guess in named if value is not guess and value != guess}
        changed += (known.slot, fields)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._num_slots += 1
        return self._num_slots - 1

    def _forget(self) -> tuple[int, ...]:
        old = self._message - MAX_ABSENT_STEPS
        gone = [key for key, known in self._known.items() if known.message < old]
        slots = tuple([self._known.pop(key).slot for key in gone])
        self._free += slots
        return slots


class PlanReceiver:
    """Turns the messages of one sender into equal plans."""

    def __init__(self) -> None:
        self._message: int | None = None
        self._steps: dict[int, SequenceStep] = {}  # by slot
        self._rows: tuple[int, ...] = ()  # slots of the last message
        self._steady = Steady()

    def decode(self, data: bytes) -> StepPlan:
        """The plan of a message.

        Raises:
            PlanGap: a message before this one is missing; nothing is understood until the sender resets.
            WireError: no sender of this release wrote these bytes.
        """
        if data[:1] == STEADY:
            return self._decode_steady(data)
        try:
            message, is_whole, number, *parts = decode(data)
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, WireError) else WireError(f"not a plan: {error}") from None
        if is_whole:
            self._steps, self._rows = {}, ()
            self._steady.set(())
        else:
            self._check_next(message)
        try:
            plan = StepPlan(number, tuple(self._apply(parts)))
        except (TypeError, ValueError, KeyError, IndexError, StopIteration, AttributeError) as error:
            self._message = None
            raise WireError(f"plan message {message} does not fit what came before it: {error!r}") from None
        self._message = message
        self._steady.set(plan.sequences)
        return plan

    def _decode_steady(self, data: bytes) -> StepPlan:
        message = self._steady.message(data)
        self._check_next(message)
        try:
            plan = self._steady.get(data)
        except WireError:
            self._message = None
            raise
        self._message = message
        return plan

    def _check_next(self, message: int) -> None:
        if self._message is None or message != self._message + 1:
            raise PlanGap(f"plan message {message} follows {self._message or 'none'}; the sender must reset")

    def _apply(self, parts: list[Any]) -> list[SequenceStep]:
        rows, tokens, grown, changed, whole, gone = parts
        self._steps.update(zip(self._rows, self._steady.steps, strict=True))
        for slot in gone:
            del self._steps[slot]
        added = _growths(grown)
        changes = dict(zip(changed[::2], changed[1::2], strict=True))
        new = dict(zip(whole[::2], whole[1::2], strict=True))
        ids = iter(tokens)
        steps = []
        for slot in rows:
            step = new.get(slot)
            if step is None:
                step = expected_step(self._steps[slot], next(ids), *added.get(slot, ((), ())))
                if slot in changes:
                    step = step._replace(**changes[slot])
            if not isinstance(step, SequenceStep):
                raise TypeError(f"slot {slot} holds {type(step).__name__}")
            self._steps[slot] = step
            steps.append(step)
        self._rows = tuple(rows)
        return steps


def _growths(grown: tuple[int, ...]) -> dict[int, tuple[tuple[BlockId, ...], tuple[int, ...]]]:
    found: dict[int, tuple[tuple[BlockId, ...], tuple[int, ...]]] = {}
    at = 0
    while at < len(grown):
        slot, count = grown[at : at + 2]
        middle, end = at + 2 + count, at + 2 + 2 * count
        if count < 1 or end > len(grown):
            raise ValueError("a growth is cut")
        found[slot] = (tuple(map(BlockId, grown[at + 2 : middle])), grown[middle:end])
        at = end
    return found
