"""Biased settings in which wires, windows and ranks carry every hand-over. See `planting.py`."""

from __future__ import annotations

import random
from dataclasses import replace

from ..kv.handover.paired_library import Patience
from .library import PairSetting
from .planting import swapping
from .setting import Mishap, Setting, ranked, windowed

PAIRED_PROMPT = 96  # tokens of each order


def pairing(setting: Setting) -> Setting:
    """Long prompts over paired channels, whose library is slow, fails and hangs. Messages come twice."""
    patience = Patience(join_s=1.0, operation_s=setting.timing.silence_s * 0.5)
    pairs = PairSetting(
        patience,
        retry_s=0.1,
        delay_s=0.01,
        join_failure=0.0,
        failure=0.05,
        hang=0.02,
        damage=setting.weather.damage,
        max_channels=4,
        is_required=True,
    )
    orders = tuple(
        replace(order, prompt_ids=(order.prompt_ids * PAIRED_PROMPT)[:PAIRED_PROMPT]) for order in setting.orders
    )
    longest = PAIRED_PROMPT + max(order.sampling.max_tokens for order in orders)
    workers = tuple(
        replace(
            worker,
            frame_tokens=16,
            frame_slots=3,
            num_blocks=3 * -(-longest // worker.block_tokens),
            limits=replace(worker.limits, max_batch_tokens=96, max_waiting_tokens=1000),
        )
        for worker in setting.workers
    )
    weather = replace(setting.weather, duplicate=max(setting.weather.duplicate, 0.2))
    return replace(setting, weather=weather, pairs=pairs, workers=workers, orders=orders)


def windowing(setting: Setting) -> Setting:
    """A layer with a window, and prompts of which much need not travel."""
    return _windowed(setting)


def _windowed(setting: Setting) -> Setting:
    return windowed(random.Random(repr(setting.orders)), setting)


def ranking(setting: Setting) -> Setting:
    """Workers of unlike numbers of ranks; ranks of each are lost while requests run."""
    setting = ranked(random.Random(repr(setting.orders)), replace(setting, window=0))
    if setting.is_bearable:
        return setting
    groups = [worker.worker_id for worker in setting.workers if worker.num_ranks > 1]
    at_s = min(order.at_s for order in setting.orders) + 0.1
    losses = tuple(Mishap(at_s + 0.1 * place, "rank", name, name, 0.5) for place, name in enumerate(groups))
    return replace(setting, mishaps=(*setting.mishaps, *losses))


def ranking_swaps(setting: Setting) -> Setting:
    """As `ranking` without losses, with answers that are longer than the pools; copies in host memory are damaged."""
    setting = swapping(setting)
    return replace(ranked(random.Random(repr(setting.orders)), replace(setting, window=0)), mishaps=())
