"""What commands write: results to standard output, messages to standard error, so that results can be piped."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TextIO

from paigeant.texts import printable
from paigeant.urls import scrubbed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from paigeant.cli.listing import Facts, Listing

__all__ = [
    "dollars",
    "error",
    "errors",
    "facts",
    "harmless",
    "instant",
    "local",
    "note",
    "only_results",
    "out",
    "plain",
    "result",
    "seconds",
    "shown",
    "size",
    "status",
    "table",
    "value",
    "warn",
]

_WIDE = 1_000_000
_results: TextIO | None = None
"""Where results go while `sys.stdout` leads elsewhere."""


@contextlib.contextmanager
def only_results() -> Iterator[None]:
    """Have nothing but results on standard output: what handlers print, or a library of theirs, counts as a message.

    Logfire prints spans, by default. Who reads JSON, or the id of a run, reads that alone.
    """
    global _results
    before = sys.stdout
    _results, sys.stdout = before, sys.stderr
    try:
        yield
    finally:
        sys.stdout, _results = before, None


def _output() -> TextIO:
    return sys.stdout if _results is None else _results


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    # Made anew each time, for the stream that is the standard one now. What goes into a pipe isn't cut to a width.
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=_WIDE)
    # By itself it would end the process with 1, as if a run had failed.
    console.on_broken_pipe = functools.partial(_reader_gone, stream)  # type: ignore[method-assign]
    return console


def _reader_gone(stream: TextIO) -> None:
    """Without a reader of the results there is no more to do; messages that nobody reads stop nothing."""
    if stream is _output():
        raise BrokenPipeError
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def out() -> Console:
    """The console for results."""
    return _console(_output())


def errors() -> Console:
    """The console for messages."""
    return _console(sys.stderr)


def result(text: str) -> None:
    """Write a line of the result as it is."""
    output = _output()
    output.write(f"{text}\n")
    output.flush()


def value(found: Any) -> None:
    """Write the result as JSON. What a terminal would obey in it is written out, which means the same."""
    plain = (_output().encoding or "").lower().replace("-", "") == "utf8"
    result(harmless(json.dumps(found, indent=2, ensure_ascii=not plain)))


def harmless(text: str) -> str:
    """A text of several lines that others have written, with whatever else a terminal would obey written out."""
    return "\n".join(map(printable, text.split("\n")))


def line(found: Any) -> None:
    """Write one of several results as JSON, on a line of its own: each can be read before the next one is there."""
    result(json.dumps(found))


def note(text: str, *, markup: bool = True, style: str | None = None) -> None:
    """Tell the user something that is no result. `markup`: whether it holds rich's tags, and nothing of others."""
    errors().print(text if markup else harmless(text), markup=markup, style=style, soft_wrap=True)


def warn(text: str) -> None:
    """Tell the user of something that may be wrong."""
    _labelled("warning", "yellow", text)


def error(text: str) -> None:
    """Tell the user what went wrong, on one line."""
    _labelled("error", "red", " ".join(text.split("\n")))


def _labelled(label: str, style: str, text: str) -> None:
    from rich.text import Text

    # Whoever wrote it: what a library says may have a URL in it, and the name of a dead letter what its sender likes.
    text = harmless(scrubbed(text))
    errors().print(Text.assemble((f"{label}: ", f"bold {style}"), text), soft_wrap=True)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Text | str]],
    *,
    cut: Sequence[str] = (),
    right: Sequence[str] = (),
) -> Listing:
    """Rows under the names of their columns. Where the terminal is too narrow, those in `cut` are shortened first.

    Those in `right` hold numbers, which end in one line.
    """
    from paigeant.cli.listing import Listing

    return Listing(columns, [[_text(cell) for cell in row] for row in rows], cut=cut, right=right)


def facts(found: Mapping[str, Text | str]) -> Facts:
    """Names with their values below each other; long values go on in the next line."""
    from paigeant.cli.listing import Facts

    return Facts({name: _text(value) for name, value in found.items()})


def _text(cell: Text | str) -> Text:
    from rich.text import Text

    return Text(cell) if isinstance(cell, str) else cell


# -- values for people


STYLES = {
    "completed": "green",
    "failed": "red",
    "compensation_failed": "red",
    "compensated": "magenta",
    "compensating": "magenta",
    "cancelled": "yellow",
    "running": "cyan",
    "waiting": "cyan",
    "skipped": "dim",
}


def status(word: str) -> Text:
    """A status in its colour."""
    from rich.text import Text

    return Text(word, style=STYLES.get(word, ""))


def plain(text: str | None, style: str = "") -> Text:
    """A text that isn't markup, on one line, and that does nothing to the terminal."""
    from rich.text import Text

    return Text(printable(" ".join((text or "").split())), style=style)


def instant(at: float | None) -> str | None:
    """An instant as ISO 8601 in UTC, with milliseconds; None for none."""
    from paigeant.clock import as_datetime

    moment = as_datetime(at)
    return None if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def local(at: float | None) -> str:
    """An instant as a person at this place reads it."""
    from paigeant.clock import as_datetime

    moment = as_datetime(at)
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def seconds(took: float | None) -> str:
    """A time span as a person reads it."""
    if took is None:
        return ""
    took = max(took, 0.0)
    if took < 1:
        return f"{took * 1000:.0f} ms"
    if took < 120:
        return f"{took:.1f} s"
    minutes, rest = divmod(round(took), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: int) -> str:
    """So many bytes as a person reads them."""
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.1f} MiB"


def dollars(cost: Decimal | None) -> str:
    """A cost in US dollars; nothing where none is known. Of small ones the first digits are shown, too."""
    if cost is None:
        return ""
    return f"${cost:,.2f}" if cost >= 1 or not cost else f"${cost:.{max(2, 1 - cost.adjusted())}f}"


def shown(found: Any, most: int = 60) -> str:
    """A JSON value on one line, cut where it is long."""
    text = printable(json.dumps(found, ensure_ascii=False))
    return text if len(text) <= most else f"{text[: most - 3]}..."
