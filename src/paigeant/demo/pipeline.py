"""The workflow of the demonstration, as a user would write one: read, outline, brief, review, write.

The reviewer is an agent with a tool that revises the run's itinerary: a brief that is too long gets a step more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, computed_field
from pydantic_ai import Agent, RunContext
from pydantic_ai.models import Model

from paigeant.activity import ActivityRegistry
from paigeant.context import StepContext
from paigeant.demo.journal import Journal
from paigeant.demo.text import Document, read_document, words
from paigeant.policy import ItineraryPolicy
from paigeant.workflow import Workflow

__all__ = ["MARK", "TOPIC", "WORKFLOW", "Brief", "Outline", "Request", "Review", "activities", "text_of"]

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

<sections>{read.sections}</sections>"""

BRIEF_PROMPT = """Now write a brief of the same document for readers in a hurry: a lead of one sentence that says what
matters most, and for each section a paragraph of up to three sentences. Add nothing that isn't in the document."""

REVIEW_PROMPT = """Review this brief, which has {brief.words} words. The most that are allowed are
<max_words>{max_words}</max_words>. If it has more, call the tool send_back once, with the reason.
Then give your verdict.

<brief>{brief}</brief>"""

SHORTEN_PROMPT = """Shorten this brief to at most <max_words>{max_words}</max_words> words in all.
Keep its lead and what matters most.

<brief>{brief}</brief>"""


def activities(model: Model | str | Mapping[str, Model], journal: Journal) -> ActivityRegistry:
    """What the worker can do. `model` is one for all agents, or one for each by name; each step begins in `journal`."""
    activity = ActivityRegistry()

    def chosen(name: str) -> Model | str:
        return model[name] if isinstance(model, Mapping) else model

    def begun(step: StepContext) -> StepContext:
        journal.begin(step)
        return step

    outliner = Agent(chosen("outline"), name="outline", output_type=Outline, deps_type=StepContext)
    writer = Agent(chosen("brief"), name="brief", output_type=Brief, deps_type=StepContext)
    reviewer = Agent(chosen("review"), name="review", output_type=Review, deps_type=StepContext)
    shortener = Agent(chosen("shorten"), name="shorten", output_type=Brief, deps_type=StepContext)

    @reviewer.tool
    async def send_back(ctx: RunContext[StepContext], reason: str) -> str:
        """Have the brief shortened before it is written to its file."""
        if not any(step.activity == "shorten" for step in ctx.deps.remaining):
            ctx.deps.insert("shorten")
        return f"It will be shortened: {reason}"

    @activity.execute(topic=TOPIC)
    def read(path: str, step: StepContext) -> Document:
        begun(step)
        return read_document(Path(path).read_text(encoding="utf-8-sig"), name=Path(path).stem)

    activity.agent(outliner, prompt=OUTLINE_PROMPT, deps=begun, topic=TOPIC)
    activity.agent(writer, prompt=BRIEF_PROMPT, deps=begun, message_history="outline", topic=TOPIC)
    activity.agent(reviewer, prompt=REVIEW_PROMPT, deps=begun, topic=TOPIC)
    activity.agent(shortener, prompt=SHORTEN_PROMPT, deps=begun, topic=TOPIC)

    @activity.execute(topic=TOPIC)
    def write(
        read: Document,
        outline: Outline,
        brief: Brief,
        target: str,
        model: str,
        step: StepContext,
        shorten: Brief | None = None,
    ) -> dict[str, str | int]:
        begun(step)
        final = shorten or brief
        # First beside it, then in its place: whoever reads the file never finds half of a brief.
        partial = Path(f"{target}.{os.getpid()}")
        partial.write_text(text_of(read, outline, final, model), encoding="utf-8")
        partial.replace(target)
        return {"path": target, "words": final.words}

    return activity


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
