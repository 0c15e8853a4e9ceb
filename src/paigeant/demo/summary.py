"""Extractive summarising: which sentences of a text say most of it. The same text gives the same result.

A sentence is worth the sum of the weights of its words, by how often they occur in the whole text (H. P. Luhn, "The
Automatic Creation of Literature Abstracts", 1958), less for its length, so that long ones don't always win. Its place
counts as well: first sentences tell what a section is about (H. P. Edmundson, "New Methods in Automatic Extracting",
1969). One that begins with "It" or "But" leans on what stands before it and is worth less alone. What repeats a
sentence that was taken already is worth less, too (Carbonell and Goldstein, "The Use of MMR", 1998).

It takes sentences as they are and understands nothing: what it gives is quoted, never invented.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from paigeant.demo.text import Section, sentences, words

__all__ = ["Sentence", "best", "pick", "rank", "within"]

_COMMON = frozenset(
    words(
        """
        a about above after again against all almost also am an and any are as at be because been before being below
        between both but by can can't could did do does doing down during each even few for from further had has have
        having he her here hers him his how i if in into is it its itself just like made many may me might more most
        much must my no nor not now of off on once one only or other our out over own same she should so some such than
        that the their them then there these they this those through to too two under until up upon us very was we were
        what when where which while who whom whose why will with within without would yet you your
        """
    )
)
_LEANING = frozenset(
    words(
        """
        also and as because both but by four he hence her his however it its neither none nor or otherwise she so such
        that their then there therefore these they this those three thus two yet
        """
    )
)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence with its place (section and position, from 0), its number of words and what it is worth."""

    section: int
    position: int
    text: str
    words: int
    score: float
    content: frozenset[str]


def rank(sections: Sequence[Section]) -> list[Sentence]:
    """All sentences of the sections in their order, each with its worth."""
    cut = [sentences(section.text) for section in sections]
    counts = Counter(word for group in cut for text in group for word in _content(text))
    return [
        _judged(text, counts, section=section, position=position, last=len(group) - 1)
        for section, group in enumerate(cut)
        for position, text in enumerate(group)
    ]


def best(ranked: Sequence[Sentence]) -> Sentence:
    """The sentence that is worth most; the first of equals."""
    return max(ranked, key=lambda sentence: sentence.score)


def pick(ranked: Sequence[Sentence], *, each: int) -> list[Sentence]:
    """Up to `each` sentences of every section, in their order."""
    taken: list[Sentence] = []
    for section in dict.fromkeys(sentence.section for sentence in ranked):
        left = [sentence for sentence in ranked if sentence.section == section]
        for _ in range(min(each, len(left))):
            chosen = max(left, key=lambda sentence: _worth(sentence, taken))
            left.remove(chosen)
            taken.append(chosen)
    return _in_order(taken)


def within(ranked: Sequence[Sentence], *, max_words: int, first: Sequence[Sentence] = ()) -> list[Sentence]:
    """As many sentences as fit into `max_words`, in their order: `first` those, then one of each section, then others.

    Never none: where not even one fits it is the shortest.
    """
    taken = list(first)
    left = [sentence for sentence in ranked if sentence not in taken]
    while left:
        seen = {sentence.section for sentence in taken}
        new = [sentence for sentence in left if sentence.section not in seen]
        chosen = max(new or left, key=lambda sentence: _worth(sentence, taken))
        left.remove(chosen)
        if sum(sentence.words for sentence in taken) + chosen.words <= max_words:
            taken.append(chosen)
    return _in_order(taken) or [min(ranked, key=lambda sentence: sentence.words)]


def _judged(text: str, counts: Counter[str], *, section: int, position: int, last: int) -> Sentence:
    content = frozenset(_content(text))
    found = words(text)
    score = sum(0.3 + math.log(counts[word]) for word in content) / max(len(found), 8) ** 0.7
    if position == 0:
        score *= 1.3
    elif position == last:
        score *= 1.05
    if section == 0:
        score *= 1.1
    if any(character.isdigit() for character in text):
        score *= 1.05
    if (found and found[0].lower() in _LEANING) or text.endswith("?"):
        score *= 0.6
    if not 6 <= len(found) <= 45:
        score *= 0.6
    return Sentence(section, position, text, len(found), score, content)


def _worth(sentence: Sentence, taken: Sequence[Sentence]) -> float:
    overlap = max((_overlap(sentence.content, other.content) for other in taken), default=0.0)
    return sentence.score * (1.0 - overlap)


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / min(len(one), len(other)) if one and other else 0.0


def _content(text: str) -> list[str]:
    """The words that carry meaning, in a form that is the same for singular and plural."""
    lower = (word.lower().removesuffix("'s").removesuffix("\u2019s") for word in words(text))
    return [
        word[:-1] if len(word) > 4 and word.endswith("s") and not word.endswith("ss") else word
        for word in lower
        if len(word) > 2 and word not in _COMMON
    ]


def _in_order(taken: Sequence[Sentence]) -> list[Sentence]:
    return sorted(taken, key=lambda sentence: (sentence.section, sentence.position))
