from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic_ai import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, FunctionModel

from paigeant.demo import offline, summary
from paigeant.demo.journal import Call, Entry, Journal
from paigeant.demo.pipeline import WORKFLOW, Request, activities
from paigeant.demo.play import DOCUMENT, Calls, Cut, Ending, _ending
from paigeant.demo.text import Section, read_document, sentences, words
from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.store import RunDetail, RunRecord, StepRecord
from paigeant.testing import MemoryApp

MARKDOWN = """---
title: ignored
---
# The *title*

Before any heading, a [link](https://example.com/a) and `code`.

## First

One sentence. And another, by Dr. Who!
It goes on.

- an item
- **another** item

```python
print("not a sentence.")
```

| a | b |
|---|---|
| 1 | 2 |

Second
------

![a picture](x.png) A _word_ with snake_case in it.

### Empty
"""


def test_markdown_becomes_sections() -> None:
    """Headings divide a document; marks, code, tables, pictures and front matter are not part of its text."""
    document = read_document(MARKDOWN, name="file")
    assert document.title == "The title"
    assert document.sections == (
        Section("Opening", "Before any heading, a link and code."),
        Section("First", "One sentence. And another, by Dr. Who! It goes on.\n\nan item\n\nanother item"),
        Section("Second", "A word with snake_case in it."),
    )


def test_a_text_without_headings_is_cut_between_paragraphs() -> None:
    """Paragraphs are put together to parts of some length, in their order."""
    paragraphs = [f"Paragraph {number} " + "word " * 80 + "." for number in range(5)]
    document = read_document("\n\n".join(paragraphs), name="file")
    assert document.title == "file"
    assert [section.heading for section in document.sections] == ["Part 1", "Part 2", "Part 3"]
    assert [section.text.count("Paragraph") for section in document.sections] == [2, 2, 1]


@pytest.mark.parametrize("text", ["", "\n \n", "# Heading\n", "```\ncode here\n```", "---", "!!! ???"])
def test_a_text_without_sentences_has_no_sections(text: str) -> None:
    """Where there is nothing to read there is nothing to summarise."""
    assert read_document(text, name="file").sections == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        (
            "By e.g. Dr. Who and J. Smith, at 3.14 p.m. in all. Yes.",
            ["By e.g. Dr. Who and J. Smith, at 3.14 p.m. in all.", "Yes."],
        ),
        ("He said: \u201cGo.\u201d Then he went.", ["He said: \u201cGo.\u201d", "Then he went."]),
        ("no end\n\nAnother", ["no end", "Another"]),
        ("雨が降った。川が増水した。", ["雨が降った。", "川が増水した。"]),
    ],
)
def test_a_text_is_cut_into_sentences(text: str, expected: Sequence[str]) -> None:
    """Abbreviations, initials and numbers end no sentence; a paragraph always does."""
    assert sentences(text) == expected


def test_the_sentence_with_the_words_of_the_text_is_worth_most() -> None:
    """What a text keeps coming back to makes a sentence telling."""
    text = (
        "Lunch was served at noon in a tent. During the night a stuck valve stopped the pump. "
        "Somebody made a drawing of the pump. Nobody had looked at this valve since last spring."
    )
    ranked = summary.rank([Section("", text)])
    assert summary.best(ranked).text == "During the night a stuck valve stopped the pump."


def test_what_was_said_already_is_worth_less() -> None:
    """Of two sentences that say the same only one is picked while there is another."""
    text = (
        "The pump failed because the valve of the pump was stuck. "
        "The valve of the pump was stuck and so the pump failed. "
        "Mobile crews brought heavy equipment from neighbouring districts."
    )
    picked = summary.pick(summary.rank([Section("", text)]), each=2)
    assert [sentence.position for sentence in picked] == [0, 2]


def test_a_summary_stays_within_its_words() -> None:
    """As many sentences as fit are taken, those of each section first, in the order of the text."""
    document = read_document(DOCUMENT.read_text(encoding="utf-8"), name="document")
    taken = summary.within(summary.rank(document.sections), max_words=200)
    assert sum(sentence.words for sentence in taken) <= 200
    assert [(sentence.section, sentence.position) for sentence in taken] == sorted(
        (sentence.section, sentence.position) for sentence in taken
    )
    assert len({sentence.section for sentence in taken}) > 5


def test_a_summary_is_never_empty() -> None:
    """Where no sentence fits it is the shortest one."""
    ranked = summary.rank([Section("", "This one is rather a long sentence. A short one.")])
    assert [sentence.text for sentence in summary.within(ranked, max_words=1)] == ["A short one."]


def test_the_document_that_ships_is_a_real_one() -> None:
    """It has some pages in several sections."""
    document = read_document(DOCUMENT.read_text(encoding="utf-8"), name="document")
    assert len(document.sections) >= 8
    assert len(words(" ".join(section.text for section in document.sections))) > 1000


DEAD, ALIVE = 7, 8
NOTHING = Calls(0, 0)


def ended(*entries: tuple[str, int, Call | None, str], recorded: Calls = NOTHING) -> Ending:
    """How a run of two steps ended, `read` and `outline`, the second of which was cut off with so much recorded."""
    run = RunRecord("r", "w", RunStatus.COMPLETED, b"{}", "", b"{}", "", "", created_at=1.0, completed_at=2.0)
    rows = tuple(
        StepRecord("r", step, Phase.DO, number, step, "t", StepStatus.COMPLETED)
        for number, step in enumerate(("read", "outline"))
    )
    journal = [Entry("r", step, pid, call, key) for step, pid, call, key in entries]
    return _ending(RunDetail(run, rows), journal, Cut("outline", DEAD, recorded))


def steps(*began: str) -> list[str]:
    """The recorded steps that ran twice, when these began."""
    return list(ended(*((step, DEAD, None, step) for step in began)).twice)


def test_the_step_that_was_cut_off_may_begin_again() -> None:
    """An attempt that died before its record is no recorded step that ran twice."""
    assert steps("read", "outline", "outline") == []


def test_a_recorded_step_that_begins_again_is_counted() -> None:
    """The demonstration can fail: a recorded step that began once more is found."""
    assert steps("read", "outline", "read", "outline") == ["read"]
    assert steps("read", "outline", "outline", "outline") == ["outline"]


def test_calls_that_nobody_made_again_are_saved() -> None:
    """What was under way when the worker died is made again, and is none of them; nor is any other step's."""
    ending = ended(
        ("read", DEAD, "model", "0"),
        ("outline", DEAD, "model", "1"),
        ("outline", DEAD, "tool", "2"),
        ("outline", DEAD, "model", "3"),
        ("outline", DEAD, "tool", "4"),
        ("outline", ALIVE, "tool", "4"),
        ("outline", ALIVE, "model", "5"),
        recorded=Calls(2, 1),
    )
    assert (ending.saved, ending.again, ending.made) == (Calls(2, 1), Calls(0, 0), Calls(4, 3))


def test_a_recorded_call_that_is_made_again_is_counted() -> None:
    """The demonstration can fail: what was recorded and is asked for once more is found, and not called saved."""
    ending = ended(
        ("outline", DEAD, "model", "1"),
        ("outline", DEAD, "tool", "2"),
        ("outline", ALIVE, "model", "1"),
        ("outline", ALIVE, "tool", "2"),
        recorded=Calls(1, 1),
    )
    assert (ending.saved, ending.again) == (Calls(0, 0), Calls(1, 1))


def test_calls_are_counted_in_words() -> None:
    """One is one, and all else are several."""
    assert str(Calls(1, 0)) == "1 model call and 0 tool calls"
    assert str(Calls(5, 1)) == "5 model calls and 1 tool call"


async def test_a_brief_that_was_sent_back_is_shortened_by_any_attempt(tmp_path: Path) -> None:
    """A reviewer whose model fails after the tool call begins anew, and what the tool changed stands all the same."""
    source = tmp_path / "note.md"
    source.write_text("The ferry leaves at nine from the north pier. Strong wind is expected by noon.")
    reviewing = offline.models()["review"]
    failed: list[int] = []

    async def review(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) > 1 and not failed:
            failed.append(len(messages))
            raise RuntimeError("no answer")
        return await reviewing.request(messages, None, info.model_request_parameters)

    known = activities({**offline.models(), "review": FunctionModel(review)}, Journal(tmp_path / "journal"))
    request = Request(path=str(source), target=str(tmp_path / "brief.md"), max_words=10, model="test")
    async with MemoryApp(known) as app:
        run = await app.dispatch(WORKFLOW, request)
        await app.drain()
        assert list((await run.wait()).outputs) == ["read", "outline", "brief", "review", "review.1", "write"]
    assert failed == [3]
