"""How long tests wait for what must come."""

from __future__ import annotations

__all__ = ["PATIENCE"]

PATIENCE = 120.0
"""Seconds: a bound that is only there so that what is broken fails a test, instead of holding it up without an end.

It is met even on a machine several times slower than most, where three tests run at once and something else besides:
a server may take half a minute to start there, a command ten seconds. A bound that is itself what a test proves stands
in that test.
"""
