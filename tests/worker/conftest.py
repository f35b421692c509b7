"""Fixtures: real workers on loopback."""

from support.clusters.leases import patient_leases
from support.engines.workers import all_free, hand_to, make_prompt, router_of, start_worker, tiny_checkpoint

__all__ = ["all_free", "hand_to", "make_prompt", "patient_leases", "router_of", "start_worker", "tiny_checkpoint"]
