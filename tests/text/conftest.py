"""Helpers beside the tests can be imported by name."""
