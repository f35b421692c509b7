"""Fixtures: real workers on loopback."""

from support.engines.workers import all_free, hand_to, make_prompt, router_of, start_worker, tiny_checkpoint

__all__ = ["all_free", "hand_to", "make_prompt", "router_of", "start_worker", "tiny_checkpoint"]
