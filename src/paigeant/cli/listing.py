"""Rows in columns, and facts below each other, for a terminal of any width; no line has blanks at its end."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

__all__ = ["Facts", "Listing"]

_BETWEEN = 2
"""Blanks between columns, and before a further line of the same row."""

_LEAST = 6
"""So many characters at least are shown of what is shortened."""


class Listing:
    """Rows of cells under the names of their columns.

    Where the width doesn't do for all columns, those in `cut` are shortened, with dots at their ends. Where that isn't
    enough each row has as many lines as it takes, and the names of the columns as many: ids, states and times are
    always there whole, to be read and copied. Columns in `right` hold numbers, which end in one line.
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Text]],
        *,
        cut: Collection[str] = (),
        right: Collection[str] = (),
    ) -> None:
        self._heads = [Text(column, style="bold") for column in columns]
        self._rows = [list(row) for row in rows]
        self._natural = [
            max(cell_len(row[place].plain) for row in [self._heads, *self._rows])
            for place in range(len(columns))
        ]
        self._cut = {place for place, column in enumerate(columns) if column in cut}
        self._right = {place for place, column in enumerate(columns) if column in right}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        dots = "..." if options.ascii_only else "\u2026"
        widths = self._widths(options.max_width)
        for row in [self._heads, *self._rows]:
            for number, line in enumerate(widths):
                for text in self._line(console, row, line, dots, further=number > 0):
                    if text.plain or number == 0:
                        yield text

    def _widths(self, most: int) -> list[dict[int, int]]:
        """The columns that stand in each line of a row, with their widths."""
        least = [
            min(width, max(_LEAST, cell_len(self._heads[place].plain))) if place in self._cut else width
            for place, width in enumerate(self._natural)
        ]
        lines: list[dict[int, int]] = [{}]
        room = most
        for place, width in enumerate(least):
            if lines[-1] and width > room:
                lines.append({})
                room = most - _BETWEEN
            lines[-1][place] = min(width, max(room, 1))
            room -= width + _BETWEEN
        for number, line in enumerate(lines):
            self._widen(line, most - (_BETWEEN if number else 0))
        return lines

    def _widen(self, line: dict[int, int], most: int) -> None:
        """Share what is left of a line among its columns that are shortened, those that lack least first."""
        left = most - sum(line.values()) - _BETWEEN * (len(line) - 1)
        lacking = sorted((self._natural[place] - line[place], place) for place in line if place in self._cut)
        for number, (lack, place) in enumerate(lacking):
            more = max(min(lack, left // (len(lacking) - number)), 0)
            line[place] += more
            left -= more

    def _line(
        self, console: Console, row: Sequence[Text], widths: Mapping[int, int], dots: str, *, further: bool
    ) -> Iterator[Text]:
        if len(widths) == 1:
            [(place, width)] = widths.items()
            if (
                place not in self._cut and cell_len(row[place].plain) > width
            ):  # by itself, and too long for a line
                yield from (_indented(part, further) for part in _folded(console, row[place], width))
                return
        cells = [self._cell(row[place], width, place, dots) for place, width in widths.items()]
        yield _indented(Text(" " * _BETWEEN).join(cells), further)

    def _cell(self, text: Text, width: int, place: int, dots: str) -> Text:
        cell = text.copy()
        if cell_len(text.plain) > width:
            cell.truncate(max(width - len(dots), 0), overflow="crop")
            cell.append(dots[:width])
        blanks = " " * (width - cell_len(cell.plain))
        return Text.assemble(blanks, cell) if place in self._right else Text.assemble(cell, blanks)


class Facts:
    """Names with their values, each on a line of its own; a value that is too long for it goes on below."""

    def __init__(self, found: Mapping[str, Text]) -> None:
        self._found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        indent = max(map(cell_len, self._found), default=0) + _BETWEEN
        width = max(options.max_width - indent, _LEAST)
        for name, value in self._found.items():
            for number, part in enumerate(_folded(console, value, width)):
                head = "" if number else name
                blanks = " " * (indent - cell_len(head))
                yield _ended(Text.assemble((head, "bold"), blanks, part))


def _folded(console: Console, text: Text, width: int) -> list[Text]:
    return list(text.wrap(console, width, overflow="fold")) or [Text()]


def _indented(text: Text, further: bool) -> Text:
    return _ended(Text.assemble(" " * _BETWEEN, text) if further else text)


def _ended(text: Text) -> Text:
    text.rstrip()
    text.no_wrap = True
    return text
