"""Random setting of one schedule, drawn from a seed: workers, limits, timeouts, requests, faults. Plain values."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..core.lease import Lease
from ..core.request import Role, SamplingParams
from ..decode_worker.journal import JournalLimits
from ..decode_worker.policy import combined_policy, decode_policy
from ..engine.policy import Policy, StepLimits
from ..kv.handover.paired_library import Patience
from ..prefill_worker.policy import prefill_policy
from ..router.routing.fleet import FleetLimits
from .library import PairSetting
from .network import Weather
from .rings import MAX_RINGS
from .workers.store import LETTERS, VOCABULARY

ACCEPTABLE_TIMEOUT_S = 20.0
DOMAINS = ("acme", "umbrella")
KILLER = "killer"  # id of the request that kills workers; no other request has it


@dataclass(frozen=True, slots=True)
class WorkerSetting:
    """Settings of one worker, the same in all its lives."""

    worker_id: str
    role: Role
    num_blocks: int
    block_tokens: int
    limits: StepLimits
    frame_tokens: int
    frame_slots: int
    max_handovers: int
    step_s: tuple[float, float]
    link_s: float
    watermark: float  # above 1, decode promises more than it has: NotYet is then frequent
    is_overlapping: bool  # commands are taken while a step runs
    numerics: bytes = b"numerics"  # the announced numerics class
    num_swap_blocks: int = 0  # host blocks for preempted sequences
    check_s: float = 0.0  # duration of verifying digests off the loop; 0: on the loop, at once
    num_ranks: int = 1
    num_rings: int = 0  # most rings of shared memory for hand-overs to it
    confirms: bool = True  # it says that it takes the order of a suspect; False: it is of an older release

    @property
    def most_taken(self) -> float:
        """Largest share of blocks in use or promised at which a sequence is admitted."""
        return {Role.PREFILL: 1.0, Role.DECODE: self.watermark, Role.COMBINED: 0.95}[self.role]

    def policy(self) -> Policy:
        """Scheduling policy of the worker's role."""
        if self.role is Role.PREFILL:
            return prefill_policy(self.limits)
        return (
            decode_policy(self.limits, watermark=self.watermark)
            if self.role is Role.DECODE
            else combined_policy(self.limits)
        )


@dataclass(frozen=True, slots=True)
class Order:
    """One request of a client, with its timeout, cancellation and attempts."""

    request_id: str
    at_s: float
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int
    domain: str
    timeout_s: float
    cancel_after_s: float | None
    attempts: int  # most sendings under one id; a failed or cancelled request is sent again
    router: str = "router"
    kills: bool = False  # every worker that computes a step of it crashes


@dataclass(frozen=True, slots=True)
class Mishap:
    """Fault of a process, or of the connection between two."""

    at_s: float
    kind: str  # "crash", "freeze", "cut", "leave", "rank"
    who: str
    other: str
    seconds: float  # until the restart, or duration of the freeze or the cut; after its drain, for "leave"


@dataclass(frozen=True, slots=True)
class Setting:
    """All random values of a schedule that are drawn before it begins."""

    weather: Weather
    timing: Lease
    session_lease: Lease  # of both ends of a session
    grace_s: float
    fleet: FleetLimits
    worker_patience_s: float
    local_prefill: bool
    max_requests: int
    is_bearable: bool  # only faults that the cluster can hide: every request must finish
    is_noisy: bool  # sampling depends on the worker and step, as without deterministic mode
    read_damage: float
    step_failure: float
    swap_damage: float  # probability that a copy in host memory is damaged
    num_speculative: int  # most guessed tokens per sequence and step; 0: none
    right_guesses: float  # probability that a guessed token is right
    draft_blocks: int  # of a draft model that guesses, per worker; 0: guesses come from the core itself
    draft_chunk: int  # tokens that a draft model catches up per step
    message_bytes: int  # largest message of a worker to its router
    echo: float  # probability that a router's message to a worker arrives once more, much later
    stray: float  # probability that a message of an older dispatch precedes one of a hand-over, under its number
    workers: tuple[WorkerSetting, ...]
    routers: tuple[str, ...]
    is_one_host: bool  # workers can map each other's memory
    names_repeat: bool  # a tenant's id gets the same internal name each time: only epochs differ
    orders: tuple[Order, ...]
    mishaps: tuple[Mishap, ...]
    leave_s: float = 1.0  # grace of a worker's drain
    journal: JournalLimits | None = None  # of every worker; None: streams have no buddies
    nonsense: float = 0.0  # probability that a buddy's answer makes no sense
    has_returns: bool = False  # prefill workers fetch what decode workers hold
    window: int = 0  # tokens that the second of two layers sees; 0: one layer, which sees all
    heads: int = 1  # split over a worker's ranks
    pairs: PairSetting | None = None  # paired channels; None: planes take the stream or shared memory

    @property
    def loses_nobody(self) -> bool:
        """True if no fault can cost a worker, a stream or a message."""
        return self.is_bearable and not self.mishaps and not any(order.kills for order in self.orders)


Vary = Callable[[Setting], Setting]


def as_drawn(setting: Setting) -> Setting:
    """No bias."""
    return setting


def draw(seed: int) -> Setting:
    """Draw the setting of a seed."""
    rng = random.Random(f"setting {seed}")
    beat_s = rng.choice((0.1, 0.25, 0.5))
    silent_s = rng.choice((0.8, 1.5, 2.0))
    is_bearable = rng.random() < 0.25
    orders = _orders(rng, 0.5, (ACCEPTABLE_TIMEOUT_S,)) if is_bearable else _orders(rng, 0.0, (0.3, 2.0, 5.0))
    workers = _workers(rng, max(len(o.prompt_ids) + o.sampling.max_tokens for o in orders))
    swap = random.Random(f"swap {seed}")  # a separate generator: the other draws of a seed stay the same
    workers = tuple(replace(worker, num_swap_blocks=swap.choice((0, 4, 16, 16))) for worker in workers)
    late = random.Random(f"late {seed}")  # separate too
    workers = tuple(replace(worker, check_s=late.choice((0.0, 0.0, 0.001, 0.02))) for worker in workers)
    rings = random.Random(f"rings {seed}")  # separate too
    workers = tuple(replace(worker, num_rings=rings.choice(MAX_RINGS)) for worker in workers)
    return_s = random.Random(f"return {seed}").choice((0.0, 0.0, 3.0))  # separate too
    guesses = random.Random(f"guesses {seed}")  # separate too
    drafts = random.Random(f"drafts {seed}")  # separate too
    setting = Setting(
        weather=_bearable_weather(rng) if is_bearable else _weather(rng),
        timing=Lease(beat_s, beat_s * rng.choice((2.5, 4.0))),
        session_lease=Lease(rng.choice((0.25, 0.5)), rng.choice((1.0, 2.0, 4.0))),
        grace_s=rng.choice((0.0, 0.5, 2.0)),
        fleet=FleetLimits(suspect_after_s=silent_s / 2, silent_after_s=silent_s, stall_after_s=5.0, return_s=return_s),
        worker_patience_s=rng.choice((0.3, 1.0)),
        local_prefill=rng.random() < 0.3,
        max_requests=rng.choice((2, 8, 8)),
        is_bearable=is_bearable,
        is_noisy=rng.random() < 0.5,
        read_damage=_rate(rng, 0.1),
        step_failure=0.0 if is_bearable else _rate(rng, 0.02),
        swap_damage=swap.choice((0.0, 0.0, swap.random() * 0.5)),
        num_speculative=guesses.choice((0, 0, 1, 4, 20)),
        right_guesses=guesses.choice((0.5, 0.9, 1.0)),
        draft_blocks=drafts.choice((0, 0, 4, 24)),
        draft_chunk=drafts.choice((3, 16, 200)),
        message_bytes=late.choice((8, 1 << 20)),
        echo=late.choice((0.0, 0.0, late.random())),
        stray=_rate(late, 0.2),
        workers=workers,
        routers=("router",),
        is_one_host=rings.random() < 0.7,
        names_repeat=False,
        orders=orders,
        mishaps=() if is_bearable else (*_mishaps(rng, [worker.worker_id for worker in workers]), *_router_lost(late)),
    )
    setting = _with_others(random.Random(f"others {seed}"), setting)
    setting = _with_a_departure(random.Random(f"departure {seed}"), setting)
    setting = _with_a_journal(random.Random(f"journal {seed}"), setting)
    setting = replace(setting, has_returns=random.Random(f"returns {seed}").random() < 0.35)
    setting = _with_windows(random.Random(f"windows {seed}"), setting)
    setting = _with_ranks(random.Random(f"ranks {seed}"), setting)
    setting = _with_pairs(random.Random(f"pairs {seed}"), setting)
    setting = _with_texts(random.Random(f"texts {seed}"), _with_a_loss(random.Random(f"loss {seed}"), setting))
    setting = _with_older_releases(random.Random(f"older {seed}"), setting)
    setting = _with_two_losses(random.Random(f"two losses {seed}"), setting)
    return _with_a_killer(random.Random(f"killer {seed}"), setting)


def _with_a_loss(rng: random.Random, setting: Setting) -> Setting:
    """In half of the bearable schedules one worker is lost while requests are under way, and comes back in time."""
    if not setting.is_bearable or rng.random() < 0.5:
        return setting
    decoders = [worker.worker_id for worker in setting.workers if worker.role is not Role.PREFILL]
    who = rng.choice(rng.choice((decoders, [worker.worker_id for worker in setting.workers])))
    kind = rng.choice(("crash", "crash", "freeze", "cut"))
    at_s = min(order.at_s for order in setting.orders) + rng.random() * rng.choice((0.1, 0.5, 1.0))
    mishap = Mishap(at_s, kind, who, rng.choice(setting.routers), rng.choice((0.3, 1.0, 2.5)))
    return replace(setting, mishaps=(mishap,), fleet=replace(setting.fleet, return_s=ACCEPTABLE_TIMEOUT_S))


def _with_older_releases(rng: random.Random, setting: Setting) -> Setting:
    """In some schedules with faults that requests may end by, some workers do not confirm orders."""
    if setting.is_bearable or rng.random() < 0.7:
        return setting
    workers = tuple(replace(worker, confirms=rng.random() < 0.5) for worker in setting.workers)
    return replace(setting, workers=workers)


def _with_two_losses(rng: random.Random, setting: Setting) -> Setting:
    """In half of the bearable schedules without another loss two workers are killed in one instant, and come back."""
    if not setting.is_bearable or setting.mishaps or rng.random() < 0.5:
        return setting
    at_s = min(order.at_s for order in setting.orders) + rng.random() * rng.choice((0.1, 0.5, 1.0))
    victims = rng.sample([worker.worker_id for worker in setting.workers], 2)
    mishaps = tuple(Mishap(at_s, "crash", who, who, rng.choice((0.3, 1.0))) for who in victims)
    return replace(setting, mishaps=mishaps, fleet=replace(setting.fleet, return_s=ACCEPTABLE_TIMEOUT_S))


def _with_a_killer(rng: random.Random, setting: Setting) -> Setting:
    """In half of the bearable schedules without a loss a request kills each worker that computes a step of it."""
    if not setting.is_bearable or setting.mishaps or rng.random() < 0.5:
        return setting
    place = rng.randrange(len(setting.orders))
    orders = [replace(order, kills=index == place) for index, order in enumerate(setting.orders)]
    orders[place] = replace(orders[place], request_id=KILLER, attempts=1)
    fleet = replace(setting.fleet, return_s=ACCEPTABLE_TIMEOUT_S)
    return replace(setting, orders=tuple(orders), fleet=fleet)


def _with_a_departure(rng: random.Random, setting: Setting) -> Setting:
    """In some schedules a worker drains while requests are under way, leaves, and comes back."""
    leave_s, chance = rng.choice((0.0, 0.3, 1.0, 3.0)), rng.random()
    decoders = [worker.worker_id for worker in setting.workers if worker.role is not Role.PREFILL]
    if chance > 0.15 or (setting.is_bearable and (len(decoders) < 2 or setting.mishaps)):
        return setting  # nobody waits for a worker that leaves on purpose
    who = rng.choice(rng.choice((decoders, [worker.worker_id for worker in setting.workers])))
    at_s = min(order.at_s for order in setting.orders) + rng.random() * rng.choice((0.1, 0.5, 1.0))
    mishap = Mishap(at_s, "leave", who, who, rng.choice((0.1, 1.0)))
    fleet = replace(setting.fleet, return_s=ACCEPTABLE_TIMEOUT_S) if setting.is_bearable else setting.fleet
    return replace(setting, mishaps=(*setting.mishaps, mishap), leave_s=leave_s, fleet=fleet)


def _with_a_journal(rng: random.Random, setting: Setting) -> Setting:
    """In a third of schedules streams have buddies, which mostly have room for copies."""
    if rng.random() > 0.35:
        return setting
    limits = JournalLimits(
        bytes_per_s=rng.choice((200.0, 2000.0, 1e9)),
        batch_tokens=rng.choice((16, 32, 64)),
        max_under_way=rng.choice((1, 2, 2)),
        retry_s=rng.choice((0.05, 0.5, 2.0)),
        max_retry_s=rng.choice((1.0, 60.0)),
    )
    factor = rng.choice((1, 2, 4, 8))
    workers = tuple(replace(worker, num_blocks=factor * worker.num_blocks) for worker in setting.workers)
    return replace(setting, journal=limits, nonsense=_rate(rng, 0.5), workers=workers)


def _with_pairs(rng: random.Random, setting: Setting) -> Setting:
    """In a quarter of schedules decode workers use paired channels, whose library fails, hangs and lets go late."""
    if rng.random() > 0.25:
        return setting
    silence_s = setting.timing.silence_s
    pairs = PairSetting(
        patience=Patience(join_s=rng.choice((0.5, 2.0)), operation_s=silence_s * rng.choice((0.2, 0.5))),
        retry_s=rng.choice((0.1, 0.5, 30.0)),
        delay_s=rng.choice((0.0005, 0.005, 0.05)),
        join_failure=rng.choice((0.0, 0.0, 0.5)),
        failure=_rate(rng, 0.2),
        hang=_rate(rng, 0.1),
        damage=setting.weather.damage,
        max_channels=rng.choice((1, 4)),
        is_required=rng.random() < 0.2,
    )
    return replace(setting, pairs=pairs)


def _with_windows(rng: random.Random, setting: Setting) -> Setting:
    """In a sixth of schedules a layer has a window, and prompts are so long that much of it need not travel."""
    if rng.random() > 0.16:
        return setting
    return windowed(rng, setting)


def windowed(rng: random.Random, setting: Setting) -> Setting:
    """A layer with a window; prompts get one of two beginnings of up to 192 tokens, and pools the room for that."""
    longest = 192
    family = [tuple(1 + rng.randrange(VOCABULARY - 1) for _ in range(longest)) for _ in range(2)]
    orders = tuple(
        replace(order, prompt_ids=rng.choice(family)[: rng.choice((64, 128, 144, longest))] + order.prompt_ids)
        for order in setting.orders
    )
    workers = tuple(
        replace(
            worker,
            num_ranks=1,
            num_blocks=worker.num_blocks + longest // worker.block_tokens * rng.choice((1, 2)),
            limits=replace(worker.limits, max_batch_tokens=4 * worker.limits.max_batch_tokens, max_waiting_tokens=2000),
        )
        for worker in setting.workers
    )
    return replace(setting, window=rng.choice((2, 16, 40, 64)), heads=1, orders=orders, workers=workers)


def _with_ranks(rng: random.Random, setting: Setting) -> Setting:
    """In a sixth of schedules workers have unlike numbers of ranks; sometimes one dies or stands still."""
    if rng.random() > 0.16 or setting.window:
        return setting
    return ranked(rng, setting)


def ranked(rng: random.Random, setting: Setting) -> Setting:
    """Workers of 1, 2 or 4 ranks; where workers fail, a rank of one is lost."""
    heads = rng.choice((2, 4))
    workers = tuple(replace(worker, num_ranks=rng.choice((1, 2, 4))) for worker in setting.workers)
    groups = [worker.worker_id for worker in workers if worker.num_ranks > 1]
    mishaps = setting.mishaps
    if groups and not setting.is_bearable and rng.random() < 0.5:
        who = rng.choice(groups)
        mishaps += (Mishap(rng.random(), "rank", who, who, rng.choice((0.3, 1.0))),)
    return replace(setting, window=0, heads=heads, workers=workers, mishaps=mishaps)


def _with_texts(rng: random.Random, setting: Setting) -> Setting:
    """Stop strings, and more choices, for some requests."""
    orders = []
    for order in setting.orders:
        sampling, num_choices = order.sampling, order.num_choices
        if rng.random() < 0.4:
            letters = LETTERS * 3 + "\u00e4\ufffd"
            stop = {"".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(rng.randint(1, 2))}
            min_tokens = rng.choice((0, 0, min(3, sampling.max_tokens)))
            include_stop = rng.random() < 0.3
            sampling = replace(sampling, stop=tuple(sorted(stop)), min_tokens=min_tokens, include_stop=include_stop)
        if num_choices > 1 and rng.random() < 0.5:
            num_choices = 3
        orders.append(replace(order, sampling=sampling, num_choices=num_choices))
    return replace(setting, orders=tuple(orders))


def _rate(rng: random.Random, most: float) -> float:
    """Return 0 in 70 % of cases, else a random rate up to `most`."""
    return rng.random() * most if rng.random() < 0.3 else 0.0


def _weather(rng: random.Random) -> Weather:
    return Weather(
        delay_s=rng.choice((0.0005, 0.005, 0.05, 0.2)),
        drop=_rate(rng, 0.05),
        duplicate=_rate(rng, 0.3),
        truncate=_rate(rng, 0.03),
        flip=_rate(rng, 0.03),
        damage=_rate(rng, 0.4),
        break_=_rate(rng, 0.03),
        stall=_rate(rng, 0.1),
        stall_s=rng.choice((0.3, 1.0, 3.0)),
        reset=rng.choice((0.0, 0.7, 1.0)),
    )


def _bearable_weather(rng: random.Random) -> Weather:
    """Faults that the hand-over must hide: delays, duplicated messages, damaged planes."""
    return Weather(delay_s=rng.choice((0.0005, 0.005, 0.02)), duplicate=_rate(rng, 0.3), damage=_rate(rng, 0.4))


def _workers(rng: random.Random, longest: int) -> tuple[WorkerSetting, ...]:
    block_tokens = rng.choice((16, 16, 32))
    num_prefill, num_decode = rng.choice(((1, 1), (1, 1), (2, 1), (1, 2), (2, 2)))
    roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode
    if rng.random() < 0.15:
        roles.append(Role.COMBINED)
    found = []
    for place, role in enumerate(roles):
        limits = StepLimits(
            max_num_seqs=rng.choice((2, 4, 8)),
            max_batch_tokens=rng.choice((16, 32, 48, 96)),
            max_waiting=rng.choice((2, 8)),
            max_waiting_tokens=rng.choice((200, 1000)),
        )
        step_s = rng.choice((0.002, 0.01, 0.04) if role is not Role.PREFILL else (0.005, 0.04, 0.1))
        found.append(
            WorkerSetting(
                worker_id=f"{role.value[0]}{place}",
                role=role,
                num_blocks=-(-longest // block_tokens) + rng.choice((0, 1, 1, 2, 6)),  # the longest request fits alone
                block_tokens=block_tokens,
                limits=limits,
                frame_tokens=16 * rng.randint(1, 3),
                frame_slots=rng.randint(1, 3),
                max_handovers=rng.choice((1, 8, 8)),
                step_s=(step_s / 2, step_s * 2),
                link_s=rng.choice((0.0, 0.0002, 0.005)),
                watermark=rng.choice((0.95, 0.95, 2.0)),
                is_overlapping=rng.random() < 0.4,
            )
        )
    return tuple(found)


def _orders(rng: random.Random, after_s: float, timeouts_s: tuple[float, ...]) -> tuple[Order, ...]:
    family = [tuple(1 + rng.randrange(VOCABULARY - 1) for _ in range(64)) for _ in range(2)]
    is_sampled = rng.random() < 0.7
    orders = []
    is_crowded = rng.random() < 0.25  # more requests than the pools hold at once
    for place in range(rng.randint(4, 6) if is_crowded else rng.randint(2, 3)):
        lengths = (rng.randint(1, 16), rng.randint(20, 60), rng.randint(40, 90))
        length = lengths[rng.choice((0, 0, 1) if is_crowded else (0, 1, 2))]
        shared = rng.choice(family)[: rng.choice((0, 16, 32, 64))]
        own = tuple(1 + rng.randrange(VOCABULARY - 1) for _ in range(length))
        seed = rng.getrandbits(40) if is_sampled else 0
        orders.append(
            Order(
                request_id=f"r{place}",
                at_s=after_s + rng.random() * rng.choice((0.01, 0.5)),
                prompt_ids=(shared + own)[:length],
                sampling=SamplingParams(
                    max_tokens=rng.choice((30, 40) if is_crowded else (1, 2, 6, 14)),
                    seed=seed,
                    ignore_eos=rng.random() < 0.5,
                ),
                num_choices=2 if rng.random() < 0.15 else 1,
                domain=rng.choice(DOMAINS),
                timeout_s=rng.choice(timeouts_s),
                cancel_after_s=rng.random() * rng.choice((0.05, 0.5)) if rng.random() < 0.25 else None,
                attempts=rng.choice((1, 1, 2, 3)),
            )
        )
    return tuple(orders)


def _with_others(rng: random.Random, setting: Setting) -> Setting:
    """Add tenants and routers that use the same request ids, and a worker of another numerics class."""
    first, second, *rest = setting.orders
    if rng.random() < 0.2 and first.domain != second.domain:
        second = replace(second, request_id=first.request_id)
    orders, mishaps, workers = [first, second, *rest], list(setting.mishaps), list(setting.workers)
    routers = ["router"]
    if rng.random() < 0.2:
        routers.append("router-b")
        copies = [replace(order, router="router-b") for order in (first, second) if rng.random() < 0.7]
        orders += copies or [replace(first, router="router-b")]
        if not setting.is_bearable and rng.random() < 0.4:
            mishaps.append(Mishap(rng.random(), "crash", "router-b", "router-b", rng.choice((0.05, 0.3, 1.0))))
    if rng.random() < 0.1:
        place = rng.randrange(len(workers))
        workers[place] = replace(workers[place], numerics=b"other numerics")
    patience_s = 3.0 if rng.random() < 0.3 else setting.worker_patience_s  # longer than a silent worker is kept
    if not setting.is_bearable and rng.random() < 0.15:  # all decode workers fail together, as on one machine
        at_s, patience_s = rng.random() * 0.5, 3.0
        decoders = [worker.worker_id for worker in workers if worker.role is not Role.PREFILL]
        mishaps += [Mishap(at_s + 0.02 * place, "crash", who, who, 2.0) for place, who in enumerate(decoders)]
    setting = replace(setting, worker_patience_s=patience_s, names_repeat=rng.random() < 0.3)
    return replace(
        setting, routers=tuple(routers), orders=tuple(orders), mishaps=tuple(mishaps), workers=tuple(workers)
    )


def _mishaps(rng: random.Random, worker_ids: list[str]) -> tuple[Mishap, ...]:
    everybody = [*worker_ids, "router"]
    found = []
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        kind = rng.choice(("crash", "freeze", "freeze", "cut"))
        seconds = rng.choice((0.05, 0.3, 1.0, 2.5))
        at_s = rng.random() * rng.choice((0.2, 1.0))
        found.append(Mishap(at_s, kind, rng.choice(everybody), rng.choice(everybody), seconds))
    return tuple(found)


def _router_lost(rng: random.Random) -> tuple[Mishap, ...]:
    """In a fifth of schedules: a crash of the router while requests are under way."""
    at_s, seconds = rng.random() * 0.5, rng.choice((0.3, 2.5))
    return (Mishap(at_s, "crash", "router", "router", seconds),) if rng.random() < 0.2 else ()
