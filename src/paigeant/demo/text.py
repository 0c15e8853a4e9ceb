"""A text as sections and sentences. Markdown's marks are taken away; what is code, a table or a picture is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Document", "Section", "read_document", "sentences", "words"]

PART_WORDS = 150
"""A text without headings is cut between paragraphs into parts of at least so many words."""

_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$")
_UNDERLINE = re.compile(r"^ {0,3}(=+|-+)[ \t]*$")
_ITEM = re.compile(r"^\s*(?:[-*+]|\d{1,3}[.)])\s+")
_RULE = re.compile(r"^ {0,3}(?:[-*_][ \t]*){3,}$")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FRONT = re.compile(r"\A---[ \t]*\n.*?\n---[ \t]*\n", re.DOTALL)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_IMAGE = re.compile(r"!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])")
_LINK = re.compile(r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])")
_MARKS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|~~)(?=\S)(.+?)(?<=\S)\1(?!\w)")
_QUOTES = "\"'\u2018\u2019\u201c\u201d"
_WORD = re.compile(r"\w+(?:['\u2019\-.,]\w+)*")
_STOP = re.compile(
    rf"[.!?\u2026]+[{_QUOTES})\]]*\s+|[\u3002\uff01\uff1f]+"
)  # the latter: Chinese and Japanese


def words(text: str) -> list[str]:
    """The words of `text`, as they are written."""
    return _WORD.findall(text)


_ABBREVIATIONS = frozenset(
    words("al approx ca cf ch dr e.g eq etc fig i.e inc jr ltd mr mrs ms no nr p pp prof sec st vol vs")
)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a document: paragraphs of plain text with an empty line in between."""

    heading: str
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text that was read. `words` counts those of its sections, without headings."""

    title: str
    sections: tuple[Section, ...]
    words: int


def read_document(text: str, *, name: str) -> Document:
    """The sections of `text`, by its headings or, without any, in parts. `name` is its title where it says none.

    A document without a sentence has no sections.
    """
    title = ""
    found: list[tuple[str, list[str]]] = [("", [])]
    for level, block in _blocks(text):
        if not level:
            found[-1][1].append(block)
        elif not title and len(found) == 1:
            title = block
            found.append(("", []))
        else:
            found.append((block, []))
    kept = [(heading, paragraphs) for heading, paragraphs in found if paragraphs]
    if not any(heading for heading, _ in kept):
        paragraphs = [paragraph for _, group in kept for paragraph in group]
        kept = [(f"Part {number}", group) for number, group in enumerate(_parts(paragraphs), 1)]
    sections = tuple(Section(heading or "Opening", "\n\n".join(group)) for heading, group in kept)
    return Document(title or name, sections, sum(len(words(section.text)) for section in sections))


def sentences(text: str) -> list[str]:
    """The sentences of `text`, in order. A paragraph always ends one."""
    return [sentence for paragraph in text.split("\n\n") for sentence in _cut(" ".join(paragraph.split()))]


def _cut(paragraph: str) -> Iterator[str]:
    start = 0
    for match in _STOP.finditer(paragraph):
        before, after = paragraph[start : match.start()], paragraph[match.end() : match.end() + 1]
        last = before.rsplit(" ", 1)[-1].lstrip(_QUOTES + "([").lower()
        if paragraph[match.start()] == "." and (
            last in _ABBREVIATIONS or (len(last) == 1 and last.isalpha())
        ):
            continue  # an abbreviation, or somebody's initial
        if after.islower():
            continue
        yield paragraph[start : match.end()].strip()
        start = match.end()
    if words(paragraph[start:]):
        yield paragraph[start:].strip()


def _parts(paragraphs: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for paragraph in paragraphs:
        part.append(paragraph)
        if sum(len(words(text)) for text in part) >= PART_WORDS:
            yield part
            part = []
    if part:
        yield part


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """Headings, with their level, and paragraphs, with level 0. An item of a list is a paragraph."""
    lines = _COMMENT.sub("", _FRONT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))).split("\n")
    held: list[str] = []
    fence = ""
    for line in [*lines, ""]:
        mark = _FENCE.match(line)
        if fence:
            fence = "" if mark is not None and mark[1] == fence else fence
            continue
        heading = _HEADING.match(line)
        level, after = 0, ""
        if mark is not None:
            fence = mark[1]
        elif heading is not None:
            level, after = len(heading[1]), heading[2]
        elif held and len(held) == 1 and (under := _UNDERLINE.match(line)) is not None:
            level, after, held = (1 if under[1][0] == "=" else 2), held[0], []
        elif _ITEM.match(line) is None and line.strip() and not _RULE.match(line):
            held.append(line.strip().lstrip(">").strip())
            continue
        if paragraph := _plain(held):
            yield 0, paragraph
        held = [_ITEM.sub("", line)] if _ITEM.match(line) and not _RULE.match(line) and not level else []
        if level and (title := _plain([after])):
            yield level, title


def _plain(lines: list[str]) -> str:
    """The lines as one text without marks; nothing for a table, or what has no words."""
    if not lines or (all("|" in line for line in lines) and len(lines) > 1):
        return ""
    text = _TAG.sub("", _LINK.sub(r"\1", _IMAGE.sub("", " ".join(lines))))
    text = " ".join(_MARKS.sub(r"\2", _MARKS.sub(r"\2", text)).replace("`", "").split())
    return text if words(text) else ""
