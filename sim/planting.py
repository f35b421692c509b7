"""Planting of a bug in production code for a `with` block, and settings with more of the faults that trigger it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..core.request import Role
from ..decode_worker.journal import JournalLimits
from .faults import Outcome, run_schedule
from .network import Weather
from .setting import ACCEPTABLE_TIMEOUT_S, Mishap, Setting, Vary, as_drawn
from .workers.store import answer_of


@dataclass(frozen=True, slots=True)
class Planted:
    """One planted bug and the number of seeds within which it must be found."""

    plant: Callable[[], AbstractContextManager[None]]
    breaks: tuple[str, ...]  # invariants, any of which shows the bug
    max_seeds: int
    vary: Vary = as_drawn  # the bias of the settings that it is looked for in

    @property
    def name(self) -> str:
        """Name of the function that plants the bug."""
        return self.plant.__name__

    @property
    def files(self) -> tuple[str, ...]:
        """The production files that it patches, relative to the package."""
        owners: list[Any] = []
        _listeners.append(owners.append)
        try:
            with self.plant():
                pass
        finally:
            _listeners.pop()
        modules = [owner_module(owner).removeprefix("twostroke.") for owner in owners]
        return tuple(dict.fromkeys(f"{module.replace('.', '/')}.py" for module in modules))

    def search(self, seeds: Iterable[int]) -> tuple[list[Outcome], Outcome | None]:
        """Play schedules with the bug until one breaks an invariant of the bug.

        Returns:
            The schedules before it that broke another invariant, and that one or None.
        """
        others: list[Outcome] = []
        with self.plant():
            for seed in seeds:
                outcome = run_schedule(seed, vary=self.vary)
                if outcome.violation is None:
                    continue
                if outcome.violation.invariant in self.breaks:
                    return others, outcome
                others.append(outcome)
        return others, None


def owner_module(owner: Any) -> str:
    """Name of the module that defines a patched class, or of the patched module itself."""
    return str(getattr(owner, "__module__", None) or owner.__name__)


CROWDED_PROMPT, CROWDED_ANSWER = 24, 40  # tokens of each order
LEAVING_PROMPT = 64
LOST_ANSWER = 30
LEFT_ANSWER = 120
COPIED_ANSWER = 48
CHAT_PROMPT, CHAT_ANSWER, CHAT_TURNS = 20, 36, 3
FEW_BYTES = JournalLimits(bytes_per_s=100.0, batch_tokens=16, max_under_way=1, retry_s=0.05, max_retry_s=0.5)
_listeners: list[Callable[[Any], None]] = []


@contextmanager
def instead(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute inside a `with` block. Refuses the simulator's own code: a bug there would prove nothing."""
    assert ".sim." not in owner_module(owner), f"{owner} is the simulator's"
    for heard in _listeners:
        heard(owner)
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    """Two replacements that are one bug."""
    with first, second:
        yield


# ------------------------------------------------------------------ biased settings


def swapping(setting: Setting) -> Setting:
    """Answers are longer than the pools: sequences are preempted and swapped, and some copies are damaged."""
    return replace(_crowded(setting), swap_damage=max(setting.swap_damage, 0.3))


def guessing(setting: Setting) -> Setting:
    """Long answers, which may end anywhere, guessed many tokens at a time; nine of ten are right."""
    setting = _crowded(setting)
    orders = tuple(replace(order, sampling=replace(order.sampling, ignore_eos=False)) for order in setting.orders)
    return replace(setting, orders=orders, num_speculative=20, right_guesses=0.9, draft_blocks=0)


def overpromising(setting: Setting) -> Setting:
    """Decode workers promise twice their pools: a bind is often answered by NotYet."""
    setting = _crowded(setting)
    return replace(setting, workers=tuple(replace(worker, watermark=2.0) for worker in setting.workers))


def damaging(setting: Setting) -> Setting:
    """Prefill workers often read damaged planes from their stores."""
    return replace(setting, read_damage=max(setting.read_damage, 0.1))


def sharing(setting: Setting) -> Setting:
    """All workers share memory; frames are small, slots few, checks and links slow."""
    workers = tuple(
        replace(worker, num_rings=8, frame_tokens=16, frame_slots=2, link_s=0.005, check_s=0.001)
        for worker in setting.workers
    )
    return replace(setting, is_one_host=True, workers=workers, pairs=None)


def freezing(setting: Setting) -> Setting:
    """Prefill workers stand still for a while as the first requests come."""
    first_s = min(order.at_s for order in setting.orders)
    names = [worker.worker_id for worker in setting.workers if worker.role is Role.PREFILL]
    freezes = [Mishap(first_s + 0.03 + 0.02 * place, "freeze", name, name, 5.0) for place, name in enumerate(names)]
    return replace(setting, is_bearable=False, mishaps=(*setting.mishaps, *freezes))


def leaving(setting: Setting) -> Setting:
    """As `sharing`, with slow reads, room for one request per decode worker, and clients that leave one by one."""
    setting = sharing(setting)
    first_s = min(order.at_s for order in setting.orders)
    orders = tuple(
        replace(
            order,
            at_s=first_s,
            prompt_ids=(order.prompt_ids * LEAVING_PROMPT)[:LEAVING_PROMPT],
            timeout_s=5.0,
            cancel_after_s=0.5 + 0.4 * place,
            attempts=3,
        )
        for place, order in enumerate(setting.orders)
    )
    longest = LEAVING_PROMPT + max(order.sampling.max_tokens for order in orders)
    workers = tuple(
        replace(worker, num_blocks=8 * -(-longest // worker.block_tokens), link_s=0.1)
        if worker.role is Role.PREFILL
        else replace(worker, num_blocks=-(-longest // worker.block_tokens), link_s=0.0)
        for worker in setting.workers
    )
    return replace(setting, is_bearable=False, orders=orders, workers=workers)


def losing_decoders(setting: Setting) -> Setting:
    """Long answers in calm weather; a decode worker crashes or freezes while they run, and all must finish."""
    first_s = min(order.at_s for order in setting.orders)
    begin_s = 0.5  # when every worker is known
    orders = tuple(
        replace(
            order,
            at_s=begin_s + (order.at_s - first_s) / 10,
            sampling=replace(order.sampling, max_tokens=LOST_ANSWER, ignore_eos=True),
            num_choices=3 if order.num_choices > 1 else 1,
            timeout_s=ACCEPTABLE_TIMEOUT_S,
            cancel_after_s=None,
        )
        for order in setting.orders
    )
    longest = max(len(order.prompt_ids) for order in orders) + LOST_ANSWER
    workers = tuple(
        replace(
            worker,
            num_blocks=8 * -(-longest // worker.block_tokens),
            numerics=setting.workers[0].numerics,
            confirms=True,
        )
        for worker in setting.workers
    )
    decoders = [worker for worker in workers if worker.role is not Role.PREFILL]
    mishaps = tuple(
        Mishap(begin_s + 0.1 + 3.0 * place + 8 * worker.step_s[1], "crash", worker.worker_id, worker.worker_id, 0.5)
        for place, worker in enumerate(decoders)
    )
    return replace(
        setting,
        weather=Weather(delay_s=0.0005),
        is_bearable=True,
        step_failure=0.0,
        orders=orders,
        workers=workers,
        mishaps=mishaps,
        fleet=replace(setting.fleet, return_s=ACCEPTABLE_TIMEOUT_S),
    )


def losing_two_decoders(setting: Setting) -> Setting:
    """As `losing_decoders`, on three decode workers at least, of which two are killed in one instant."""
    setting = losing_decoders(setting)
    decoders = [worker for worker in setting.workers if worker.role is not Role.PREFILL]
    more = [replace(decoders[0], worker_id=f"more{place}") for place in range(3 - len(decoders))]
    victims = [worker.worker_id for worker in (*decoders, *more)][:2]
    at_s = setting.mishaps[0].at_s
    mishaps = tuple(Mishap(at_s, "crash", who, who, 0.5) for who in victims)
    workers = tuple(  # a request of three choices must fit the queue of one
        replace(worker, limits=replace(worker.limits, max_waiting=8)) for worker in (*setting.workers, *more)
    )
    return replace(setting, workers=workers, mishaps=mishaps)


def departing_decoders(setting: Setting) -> Setting:
    """Long answers in calm weather, on two decode workers at least; one drains while they run. Frames are small."""
    setting = losing_decoders(setting)
    orders = tuple(replace(order, sampling=replace(order.sampling, max_tokens=LEFT_ANSWER)) for order in setting.orders)
    longest = max(len(order.prompt_ids) for order in orders) + LEFT_ANSWER
    workers = [
        replace(
            worker,
            frame_tokens=16,
            num_blocks=8 * -(-longest // worker.block_tokens),
            limits=replace(worker.limits, max_num_seqs=8, max_waiting=8),
            step_s=(0.004, 0.006),
        )
        for worker in setting.workers
    ]
    decoders = [worker for worker in workers if worker.role is not Role.PREFILL]
    if len(decoders) < 2:
        workers.append(replace(decoders[0], worker_id="second"))
    leave = replace(setting.mishaps[0], at_s=setting.orders[0].at_s + 0.2, kind="leave")
    return replace(setting, orders=orders, workers=tuple(workers), mishaps=(leave,), leave_s=0.4)


def damaging_departures(setting: Setting) -> Setting:
    """As `departing_decoders`, and much of what travels is damaged."""
    setting = departing_decoders(setting)
    return replace(setting, weather=replace(setting.weather, damage=0.3))


def copying(setting: Setting) -> Setting:
    """Two streams in calm weather, two decode workers at least; buddies have room and answer late, bytes are few."""
    setting = departing_decoders(setting)
    orders = tuple(
        replace(order, sampling=replace(order.sampling, max_tokens=COPIED_ANSWER), num_choices=1)
        for order in setting.orders[:2]
    )
    weather = Weather(delay_s=0.02)
    return replace(setting, orders=orders, journal=FEW_BYTES, nonsense=0.1, weather=weather, mishaps=())


def copying_in_bad_weather(setting: Setting) -> Setting:
    """As `copying`, with many bytes; streams break and stall, messages are lost, a worker crashes or freezes."""
    setting = copying(setting)
    weather = Weather(delay_s=0.02, drop=0.1, break_=0.02, stall=0.1, stall_s=2.0, damage=0.05, reset=0.0)
    orders = tuple(
        replace(
            order,
            attempts=1,
            timeout_s=5.0,
            sampling=replace(order.sampling, max_tokens=COPIED_ANSWER * (2 + place) // 3),
        )
        for place, order in enumerate(setting.orders)
    )
    who = setting.workers[-1].worker_id if setting.is_noisy else setting.workers[0].worker_id
    mishap = Mishap(0.8, "freeze" if setting.is_one_host else "crash", who, who, 1.5)
    journal = replace(FEW_BYTES, bytes_per_s=1e9)
    return replace(setting, orders=orders, journal=journal, weather=weather, mishaps=(mishap,), is_bearable=False)


def chatting(setting: Setting) -> Setting:
    """One chat in calm weather: each turn begins with the turns before it, whose answers only decode workers hold."""
    setting = departing_decoders(setting)
    first = setting.orders[0]
    sampling = replace(first.sampling, max_tokens=CHAT_ANSWER, stop=(), min_tokens=0)
    orders, prompt = [], (first.prompt_ids * CHAT_PROMPT)[:CHAT_PROMPT]
    for place in range(CHAT_TURNS):
        turn = replace(first, request_id=f"turn{place}", at_s=0.5 + place / 2, prompt_ids=prompt, sampling=sampling)
        turn = replace(turn, kills=False)
        orders.append(replace(turn, num_choices=1 + (place == CHAT_TURNS - 1) * (len(setting.orders) % 2)))
        asked = tuple(1 + (token_id + place) % 60 for token_id in (first.prompt_ids * CHAT_PROMPT)[:CHAT_PROMPT])
        prompt = (*prompt, *answer_of(first.domain, prompt, sampling), *asked)
    workers = tuple(
        replace(worker, num_blocks=4 * -(-len(prompt) // worker.block_tokens), max_handovers=8)
        for worker in setting.workers
    )
    return replace(
        setting, orders=tuple(orders), workers=workers, mishaps=(), journal=None, is_noisy=False, has_returns=True
    )


def chatting_in_bad_weather(setting: Setting) -> Setting:
    """As `chatting`; streams break and stall, planes are damaged, clients leave while blocks come, a worker freezes."""
    setting = chatting(setting)
    weather = Weather(delay_s=0.01, drop=0.01, break_=0.01, stall=0.12, stall_s=1.0, damage=0.15, reset=0.0)
    orders = tuple(
        replace(order, attempts=2, timeout_s=5.0, cancel_after_s=0.04 if place == 1 else None)
        for place, order in enumerate(setting.orders)
    )
    who = next(worker.worker_id for worker in setting.workers if worker.role is not Role.PREFILL)
    mishaps = (Mishap(1.53, "freeze", who, who, 1.5),) if setting.is_one_host else ()
    return replace(setting, orders=orders, weather=weather, mishaps=mishaps, is_bearable=False)


def losing_routers(setting: Setting) -> Setting:
    """A router crashes while its requests are under way, and comes back after the workers' grace."""
    at_s = max(order.at_s for order in setting.orders) + 0.2
    crash = Mishap(at_s, "crash", setting.routers[0], setting.routers[0], 2.5)
    return replace(setting, is_bearable=False, mishaps=(*setting.mishaps, crash))


def _crowded(setting: Setting) -> Setting:
    """Short prompts with long answers at nearly one time, on the smallest pools that hold any one of them."""
    first_s = min(order.at_s for order in setting.orders)
    orders = tuple(
        replace(
            order,
            at_s=first_s + (order.at_s - first_s) / 10,
            prompt_ids=order.prompt_ids[:CROWDED_PROMPT],
            sampling=replace(order.sampling, max_tokens=CROWDED_ANSWER, ignore_eos=True),
        )
        for order in setting.orders
    )
    workers = tuple(
        replace(
            worker,
            num_blocks=-(-(CROWDED_PROMPT + CROWDED_ANSWER) // worker.block_tokens) + 1,
            num_swap_blocks=16,
            limits=replace(worker.limits, max_num_seqs=8, max_waiting=8),
        )
        for worker in setting.workers
    )
    return replace(setting, orders=orders, workers=workers)
