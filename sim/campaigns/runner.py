"""Plays the schedules of a campaign in several processes, range by range, as far as its journal has not them yet."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice

from ..faults import Campaign, run_schedule
from .journal import Journal, Range, Sums

SEEDS_PER_CAMPAIGN = 1_000_000
RANGE = 50  # schedules: some seconds of one core


def play(done: Range) -> Range:
    """Play the schedules of a range."""
    campaign = Campaign()
    for seed in range(done.first, done.first + done.count):
        campaign.add(run_schedule(seed))
    failed = tuple(outcome.seed for outcome in campaign.failed)
    return Range(
        done.first, campaign.num_schedules, campaign.num_events, campaign.virtual_s, dict(campaign.ends), failed
    )


def ranges_of(campaign: int, num_schedules: int, size: int = RANGE) -> Iterator[Range]:
    """The ranges of a campaign's first schedules."""
    first = campaign * SEEDS_PER_CAMPAIGN
    for start in range(0, num_schedules, size):
        yield Range(first + start, min(size, num_schedules - start))


def run_ranges(
    campaign: int, num_schedules: int, journal: Journal, jobs: int, heard: Callable[[Sums], None] | None = None
) -> Sums:
    """Play all ranges that the journal does not have, `jobs` at a time, until one has failed; returns all sums.

    `heard` is called after every range. An interrupt loses only the ranges that are under way.
    """
    sums = Sums()
    known = {(done.first, done.count): done for done in journal.done}
    missing = []
    for wanted in ranges_of(campaign, num_schedules):
        done = known.get((wanted.first, wanted.count))
        if done is None:
            missing.append(wanted)
        else:
            sums.add(done)
    todo = iter(missing)
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        running: set[Future[Range]] = {pool.submit(play, one) for one in islice(todo, jobs)}
        while running and not sums.failed:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                result = future.result()
                journal.add(result)
                sums.add(result)
                if heard is not None:
                    heard(sums)
            running |= {pool.submit(play, one) for one in islice(todo, jobs - len(running))}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return sums
