"""Rows of the tables, and the records that they are."""

from __future__ import annotations

from dataclasses import fields

from paigeant.store import StepRecord
from paigeant.tables import step_executions


def test_a_row_of_steps_is_a_record_as_it_stands() -> None:
    """The record is made of the row's values in their order, without their names."""
    assert [field.name for field in fields(StepRecord)] == [column.name for column in step_executions.c]
