"""Listings: what stands in them at which width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from paigeant.cli.listing import Facts, Listing

RUN = "01a22efb-d886-70d4-a87c-64f6ad2570f1"
COLUMNS = ("id", "workflow", "status", "created", "error")
ROW = (RUN, "fulfil_order", "compensated", "2026-12-01 00:22:38", "the card ending in 0000 was declined")


def lines(made: Listing | Facts, width: int) -> list[str]:
    """What a terminal of this width shows."""
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(made)
    return stream.getvalue().splitlines()


def listing(*rows: tuple[str, ...]) -> Listing:
    """Runs as they are listed."""
    return Listing(COLUMNS, [[Text(cell) for cell in row] for row in rows], cut=["error"])


def test_a_row_has_one_line_where_there_is_room() -> None:
    """Its cells stand under the names of their columns."""
    assert lines(listing(ROW), 200) == [
        f"id{' ' * 36}workflow      status       created              error",
        "  ".join(ROW),
    ]


def test_a_column_that_may_be_cut_gives_way_first() -> None:
    """Dots say that there is more of it; all else is there whole."""
    assert lines(listing(ROW), 100)[1] == f"{'  '.join(ROW[:4])}  the card endi…"


def test_dots_are_such_as_the_terminal_has() -> None:
    """One of another encoding would show the number of the sign in its place."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    Console(file=stream, width=100).print(listing(ROW))
    stream.seek(0)
    assert stream.read().splitlines()[1] == f"{'  '.join(ROW[:4])}  the card en..."


def test_on_a_narrow_terminal_a_row_goes_on_in_further_lines() -> None:
    """So an id can be copied whole on a terminal of 80 columns, and a state read."""
    assert lines(listing(ROW), 80) == [
        f"id{' ' * 36}workflow      status",
        "  created              error",
        f"{RUN}  fulfil_order  compensated",
        "  2026-12-01 00:22:38  the card ending in 0000 was declined",
    ]


@pytest.mark.parametrize("width", [3, 9, 20, 36, 40, 80])
def test_nothing_but_what_may_be_cut_is_lost_at_any_width(width: int) -> None:
    """No line is longer than the terminal is wide, and no cell lacks a character."""
    found = lines(listing(ROW), width)
    assert max(map(len, found)) <= width
    text = "".join("".join(line.split()) for line in found)
    assert all("".join(cell.split()) in text for cell in ROW[:4])


def test_a_line_without_anything_in_it_is_left_out() -> None:
    """What a row doesn't have takes no line; a row always has its first."""
    narrow = lines(listing(ROW, (RUN, "fulfil_order", "pending", "", "")), 80)
    assert narrow[4:] == [f"{RUN}  fulfil_order  pending"]
    assert lines(Listing(["a"], [[Text("")]]), 80) == ["a", ""]


def test_no_line_ends_in_blanks() -> None:
    """So that what is copied or piped has none."""
    found = lines(listing(ROW, ("a", "b", "c", "d", "")), 200) + lines(Facts({"error": Text("")}), 80)
    assert found == [line.rstrip() for line in found]


def test_numbers_end_in_one_line() -> None:
    """So that they can be compared."""
    made = Listing(["unit", "size"], [[Text("a"), Text("7")], [Text("b"), Text("1,024")]], right=["size"])
    assert lines(made, 80) == ["unit   size", "a         7", "b     1,024"]


def test_wide_characters_count_as_two() -> None:
    """Columns stay below each other whatever is in them."""
    made = Listing(["name", "n"], [[Text("漢字"), Text("1")], [Text("ab"), Text("2")]])
    assert lines(made, 80) == ["name  n", "漢字  1", "ab    2"]


def test_a_long_value_goes_on_below_itself() -> None:
    """Its name stands in front of its first line."""
    made = Facts({"run": Text("r-1"), "input": Text('{"sku": "A-1", "card": "4242 4242"}')})
    assert lines(made, 30) == ["run    r-1", 'input  {"sku": "A-1", "card":', '       "4242 4242"}']
