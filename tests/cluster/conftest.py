"""Fixtures: real workers on loopback."""

from support.models import family_directory
from support.workers import all_free, hand_to, make_prompt, router_of, start_worker, tiny_checkpoint

__all__ = ["all_free", "family_directory", "hand_to", "make_prompt", "router_of", "start_worker", "tiny_checkpoint"]
