"""The models that need no key: each does its agent's task by extractive summarising of the text that it is given.

They are pydantic-ai models like any other: all they know is the conversation, and all they give is an answer or a tool
call. `summary.py` does the work. They say what they are in their name, which the terminal and the brief show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_ai import ModelMessage, ModelRequest, ModelResponse, ToolCallPart, UserPromptPart
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.function import AgentInfo, FunctionModel

from paigeant.demo import summary
from paigeant.demo.pipeline import Reading
from paigeant.demo.text import Section, words

__all__ = ["NAME", "models"]

NAME = "offline-extractive"
"""What the models are called in messages, in the brief and on the screen."""

PER_SECTION = 3
"""How many sentences of each section a brief has before somebody shortens it."""

_PARAGRAPH_WORDS = 40


def models() -> Mapping[str, Model]:
    """A model for each agent of the pipeline, by the agent's name."""
    tasks: dict[str, Callable[[list[ModelMessage]], ToolCallPart | dict[str, Any]]] = {
        "outline": _outline,
        "brief": _brief,
        "review": _review,
        "shorten": _shorten,
    }
    return {name: _model(task) for name, task in tasks.items()}


def _model(task: Callable[[list[ModelMessage]], ToolCallPart | dict[str, Any]]) -> Model:
    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        answer = task(messages)
        if isinstance(answer, dict):
            answer = ToolCallPart(info.output_tools[0].name, answer)
        return ModelResponse(parts=[answer])

    return FunctionModel(respond, model_name=NAME)


def _outline(messages: list[ModelMessage]) -> ToolCallPart | dict[str, Any]:
    """Read on as long as there is something left; then for each section the sentence that says most."""
    readings = _readings(messages)
    start = readings[-1].next if readings else 1
    if start is not None:
        return ToolCallPart("read_on", {"number": start})
    sections = _sections(messages)
    ranked = summary.rank(sections)
    points = []
    for number, section in enumerate(sections):
        own = [sentence for sentence in ranked if sentence.section == number]
        points.append({"heading": section.heading, "gist": summary.best(own).text})
    return {"points": points}


def _brief(messages: list[ModelMessage]) -> dict[str, Any]:
    """The best sentence of all, and the best few of each section. It has the document from the earlier conversation."""
    ranked = summary.rank(_sections(messages))
    lead = summary.best(ranked)
    picked = summary.pick([sentence for sentence in ranked if sentence != lead], each=PER_SECTION)
    return {"lead": lead.text, "paragraphs": _paragraphs(picked, least=1)}


def _review(messages: list[ModelMessage]) -> ToolCallPart | dict[str, Any]:
    """Count the words; send the brief back where there are too many, and say so."""
    prompt = _prompts(messages)[-1]
    brief, most = _tagged(prompt, "brief"), _max_words(prompt)
    count = len(words(brief["lead"])) + sum(len(words(text)) for text in brief["paragraphs"])
    if count <= most:
        return {"verdict": "fits", "remark": f"{count} words, {most} are allowed"}
    remark = f"{count} words, {most} are allowed: {count - most} too many"
    if not any(isinstance(part, ToolReturnPart) for message in messages for part in message.parts):
        return ToolCallPart("send_back", {"reason": remark})
    return {"verdict": "too long", "remark": remark}


def _shorten(messages: list[ModelMessage]) -> dict[str, Any]:
    """The lead, then the sentences that say most of what the brief says, as far as there is room."""
    prompt = _prompts(messages)[-1]
    brief, most = _tagged(prompt, "brief"), _max_words(prompt)
    ranked = summary.rank([Section("", text) for text in brief["paragraphs"]])
    room = max(most - len(words(brief["lead"])), 1)
    return {
        "lead": brief["lead"],
        "paragraphs": _paragraphs(summary.within(ranked, max_words=room), least=_PARAGRAPH_WORDS),
    }


def _paragraphs(sentences: list[summary.Sentence], *, least: int) -> list[str]:
    """The sentences as paragraphs, one a section or longer: of at least so many words, where there are so many."""
    paragraphs: list[list[str]] = []
    last, size = -1, least
    for sentence in sentences:
        if sentence.section != last and size >= least:
            paragraphs.append([])
            size = 0
        paragraphs[-1].append(sentence.text)
        last, size = sentence.section, size + sentence.words
    return [" ".join(texts) for texts in paragraphs]


def _prompts(messages: list[ModelMessage]) -> list[str]:
    return [
        part.content
        for message in messages
        if isinstance(message, ModelRequest)
        for part in message.parts
        if isinstance(part, UserPromptPart) and isinstance(part.content, str)
    ]


def _readings(messages: list[ModelMessage]) -> list[Reading]:
    """What was read in the conversation, in order. In one that is continued it is JSON."""
    return [
        Reading.model_validate_json(part.model_response_str())
        for message in messages
        for part in message.parts
        if isinstance(part, ToolReturnPart) and part.tool_name == "read_on"
    ]


def _sections(messages: list[ModelMessage]) -> list[Section]:
    """The sections that were read in the conversation."""
    return [section for reading in _readings(messages) for section in reading.sections]


def _tagged(prompt: str, tag: str) -> Any:
    """The JSON value between two tags of the prompt. The last closing tag counts: others may be part of a text."""
    found = re.search(rf"<{tag}>([\[{{].*)</{tag}>", prompt, re.DOTALL)
    if found is None:
        raise ValueError(f"the prompt has no <{tag}>")
    return json.loads(found[1])


def _max_words(prompt: str) -> int:
    found = re.search(r"<max_words>(\d+)</max_words>", prompt)
    if found is None:
        raise ValueError("the prompt has no <max_words>")
    return int(found[1])
