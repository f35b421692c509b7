"""Biased settings in which wires, windows and ranks carry every hand-over. See `planting.py`."""

from __future__ import annotations

from dataclasses import replace

from ..kv.handover.paired_library import Patience
from .library import PairSetting
from .setting import Setting

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
