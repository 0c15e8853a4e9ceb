"""The table as a whole: every place where input comes from has its cases, and each case has a name of its own."""

from __future__ import annotations

from tests.bad_input import (
    test_activities,
    test_cli,
    test_configuration,
    test_handlers,
    test_input_files,
    test_messages,
    test_storage,
)

TABLE = [
    (module.SURFACE, str(case))
    for module in (
        test_cli,
        test_configuration,
        test_handlers,
        test_input_files,
        test_messages,
        test_activities,
        test_storage,
    )
    for case in module.CASES
]


def test_every_surface_has_its_cases() -> None:
    """No kind of input is trusted: each has at least ten ways of being wrong in the table, all of them at least 200."""
    counted = {surface: sum(1 for found, _ in TABLE if found == surface) for surface, _ in TABLE}
    assert set(counted) == {
        "command line",
        "configuration",
        "handlers",
        "input files",
        "messages",
        "activities",
        "storage",
    }
    assert min(counted.values()) >= 10, counted
    assert len(TABLE) >= 200, counted


def test_no_case_stands_in_the_table_twice() -> None:
    """Two cases of one name would be one mistake tried twice."""
    assert sorted(set(TABLE)) == sorted(TABLE)
