"""The workflow of the demonstration, as a user would write one: read, outline, brief, review, write.

The outliner is an agent with a tool to read with: it asks its model and calls the tool many times in its one step. The
reviewer is one with a tool that revises the run's itinerary: a brief that is too long gets a step more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, computed_field
from pydantic_ai import Agent, RunContext
from pydantic_ai.models import Model

from paigeant.activity import ActivityRegistry
from paigeant.context import StepContext
from paigeant.demo.journal import Journal, Watched
from paigeant.demo.text import Document, Section, read_document, words
from paigeant.policy import ItineraryPolicy
from paigeant.workflow import Workflow

__all__ = [
    "MARK",
    "TOPIC",
    "WORKFLOW",
    "Brief",
    "Outline",
    "Reading",
    "Request",
    "Review",
    "activities",
    "readings",
    "text_of",
]

TOPIC = "paigeant-demo"
"""Where all steps wait: workers of other applications in the same file have nothing to do with them."""

MARK = "Made by `paigeant demo`"
"""Stands in each brief that was written here."""


class Request(BaseModel):
    """What a run starts from: a document, the file for its brief, the most words it may have, and who writes it."""

    path: str
    target: str
    max_words: int
    model: str


class Reading(BaseModel):
    """What comes of reading on: some sections, and the number of the section after them; None at the end."""

    sections: list[Section]
    next: int | None


@dataclass(frozen=True, slots=True)
class Desk:
    """What the outliner's tool reads."""

    document: Document


class Point(BaseModel):
    heading: str
    gist: str


class Outline(BaseModel):
    """One sentence on each section."""

    points: list[Point]


class Brief(BaseModel):
    """A lead of one sentence, and paragraphs."""

    lead: str
    paragraphs: list[str]

    @computed_field  # type: ignore[prop-decorator]  # as pydantic documents it
    @property
    def words(self) -> int:
        """How many words it has in all."""
        return sum(len(words(text)) for text in (self.lead, *self.paragraphs))


class Review(BaseModel):
    """What a reviewer says."""

    verdict: Literal["fits", "too long"]
    remark: str


WORKFLOW = Workflow(
    "document_brief",
    ["read", "outline", "brief", "review", "write"],
    input_model=Request,
    # Whatever a model may think of: one step more, and only this one.
    policy=ItineraryPolicy(allowed=("shorten",), max_added=1),
    description="a document becomes a brief of it",
)

OUTLINE_PROMPT = """Outline the document "{read.title}": one sentence for each of its sections, that says what it found.
Read it with the tool read_on, first from section 1, then from where the reading before ended, until nothing is left."""

BRIEF_PROMPT = """Now write a brief of the same document for readers in a hurry: a lead of one sentence that says what
matters most, and for each section a paragraph of up to three sentences. Add nothing that isn't in the document."""

REVIEW_PROMPT = """Review this brief, which has {brief.words} words. The most that are allowed are
<max_words>{max_words}</max_words>. If it has more, call the tool send_back once, with the reason.
Then give your verdict.

<brief>{brief}</brief>"""

SHORTEN_PROMPT = """Shorten this brief to at most <max_words>{max_words}</max_words> words in all.
Keep its lead and what matters most.

<brief>{brief}</brief>"""


_MOST_READINGS = 12
"""Documents with many sections are read several at a time: a run of an agent may ask its model 50 times."""


def readings(document: Document) -> int:
    """How often a model that reads a document to its end calls the tool for it."""
    return -(-len(document.sections) // _at_a_time(document))


def _at_a_time(document: Document) -> int:
    return -(-len(document.sections) // _MOST_READINGS)


def activities(model: Model | str | Mapping[str, Model], journal: Journal) -> ActivityRegistry:
    """What the worker can do. `model` is one for all agents, or one for each by name.

    Each step begins in `journal`, and so does each call of a model or a tool.
    """
    activity = ActivityRegistry()

    def chosen(name: str) -> Model:
        return Watched(model[name] if isinstance(model, Mapping) else model, journal)

    async def desk(read: Document) -> Desk:
        await journal.begin()
        return Desk(read)

    async def begun(step: StepContext) -> StepContext:
        await journal.begin()
        return step

    outliner = Agent(chosen("outline"), name="outline", output_type=Outline, deps_type=Desk)
    writer = Agent(chosen("brief"), name="brief", output_type=Brief, deps_type=StepContext)
    reviewer = Agent(chosen("review"), name="review", output_type=Review, deps_type=StepContext)
    shortener = Agent(chosen("shorten"), name="shorten", output_type=Brief, deps_type=StepContext)

    @outliner.tool
    async def read_on(ctx: RunContext[Desk], number: Annotated[int, Field(ge=1)]) -> Reading:
        """Read the document on from the section of that number, counted from 1."""
        await journal.begin("tool")
        document = ctx.deps.document
        end = number - 1 + _at_a_time(document)
        found = list(document.sections[number - 1 : end])
        return Reading(sections=found, next=end + 1 if end < len(document.sections) else None)

    # Not recorded: what it changes is the step itself, and an attempt that starts anew has to change it, too.
    @reviewer.tool(metadata={"paigeant": {"inline": True}})
    async def send_back(ctx: RunContext[StepContext], reason: str) -> str:
        """Have the brief shortened before it is written to its file."""
        await journal.begin("tool")
        if not any(step.activity == "shorten" for step in ctx.deps.remaining):
            ctx.deps.insert("shorten")
        return f"It will be shortened: {reason}"

    @activity.execute(topic=TOPIC)
    async def read(path: str) -> Document:
        await journal.begin()
        text = await asyncio.to_thread(Path(path).read_text, encoding="utf-8-sig")
        return read_document(text, name=Path(path).stem)

    activity.agent(outliner, prompt=OUTLINE_PROMPT, deps=desk, topic=TOPIC)
    activity.agent(writer, prompt=BRIEF_PROMPT, deps=begun, message_history="outline", topic=TOPIC)
    activity.agent(reviewer, prompt=REVIEW_PROMPT, deps=begun, topic=TOPIC)
    activity.agent(shortener, prompt=SHORTEN_PROMPT, deps=begun, topic=TOPIC)

    @activity.execute(topic=TOPIC)
    async def write(
        read: Document,
        outline: Outline,
        brief: Brief,
        target: str,
        model: str,
        shorten: Brief | None = None,
    ) -> dict[str, str | int]:
        await journal.begin()
        final = shorten or brief
        await asyncio.to_thread(_put, Path(target), text_of(read, outline, final, model))
        return {"path": target, "words": final.words}

    return activity


def _put(target: Path, text: str) -> None:
    # First beside it, then in its place: whoever reads the file never finds half of a brief.
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def text_of(document: Document, outline: Outline, brief: Brief, model: str) -> str:
    """The brief as Markdown."""
    parts = [
        f"# {document.title}",
        f"**{brief.lead}**",
        *brief.paragraphs,
        "## Outline",
        "\n".join(f"- **{point.heading}.** {point.gist}" for point in outline.points),
        "---",
        f"*{MARK}: {brief.words} words of {document.words}, by the model {model}.*",
    ]
    return "\n\n".join(parts) + "\n"
