"""Fixtures: tiny checkpoints, and runners over them."""

from support.checkpoints.models import _one_thread, family_directory, make_hand, make_runner, write_tiny

__all__ = ["_one_thread", "family_directory", "make_hand", "make_runner", "write_tiny"]
