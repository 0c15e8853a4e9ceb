"""Counts of anything, and how large they may be."""

from __future__ import annotations

__all__ = ["LARGEST_COUNT", "is_count"]

LARGEST_COUNT = 2**31 - 1
"""The largest count of anything: what other languages and databases can hold."""


def is_count(value: object, least: int, most: int = LARGEST_COUNT) -> bool:
    """Whether `value` is a whole number from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
