"""A step that an agent works for, without a worker: attempts of it that end where a test wants them to."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic_ai import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.messages import ModelRequest, RetryPromptPart, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from paigeant.agents.durability import replay_scope
from paigeant.clock import Clock, SystemClock
from paigeant.journal import Journal
from paigeant.place import Place
from paigeant.slip import RunStatus
from paigeant.store import NextStep, Request, RunRecord, StepKey
from paigeant.stores.memory import MemoryStore

__all__ = ["Crash", "Step", "asks", "called", "prompt_of", "returned", "scripted", "without_moments"]

Value = TypeVar("Value")


class Crash(BaseException):
    """The end of a process, as code sees it that is in the way."""


class Step:
    """One step and what is recorded of it, in memory. Each `attempt` may crash behind its so many-eth new record."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or SystemClock()
        self.store = MemoryStore(clock=self.clock)
        self.key = StepKey("run", "step")
        self.saved: list[str] = []
        self.read = 0
        self._crash_after: int | None = None
        self._before: set[str] = set()

    async def attempt(
        self, work: Callable[[], Awaitable[Value]], *, crash_after: int | None = None, first: bool = False
    ) -> Value:
        """What `work` gives in a new attempt. `first`: the step is fresh, so that no records are read."""
        self._crash_after = crash_after
        self._before = set(await self.store.load_units(self.key))
        effect = f"{self.key.workflow_id}:{self.key.step}"
        values: Any = self  # all that a journal asks for
        journal = Journal(self.key, values, effect, is_fresh=first, now=self.clock.now)
        journal.open()
        with Place(journal).entered(), replay_scope():
            try:
                return await work()
            except Exception as exc:
                await journal.failed(exc)
                raise

    async def resumed(self, work: Callable[[], Awaitable[Value]]) -> tuple[Value, int]:
        """What `work` gives after a crash behind each of its records, one an attempt, and how many crashes it took."""
        crashes = 0
        while True:
            try:
                return await self.attempt(work, crash_after=1), crashes
            except Crash:
                crashes += 1
                assert crashes < 100, "no attempt gets any further"

    async def asked(self) -> Request:
        """What an attempt asked of people: one thing."""
        await self.start()
        [request] = await self.store.list_requests()
        return request

    async def answer(self, answer: bytes) -> None:
        """Answer that."""
        await self.store.answer_request((await self.asked()).id, answer)

    async def start(self) -> None:
        """Have the step's run recorded, as whoever asks or is sent something needs it."""
        run = RunRecord(self.key.workflow_id, "w", RunStatus.PENDING, b"{}", "", b"{}", "", "")
        await self.store.record_workflow_start(run, NextStep(self.key, "a", "t"))

    @property
    def units(self) -> list[str]:
        """The names of all records, in the order in which they were made."""
        return list(self.saved)

    # -- the part of a store that a journal needs

    async def save_unit(self, key: StepKey, name: str, value: bytes) -> bytes:
        if self._crash_after == 0:
            raise Crash  # what else was under way is gone with the process
        assert name not in self._before or "!begun" in name, f"{name} was done again"
        stands = await self.store.save_unit(key, name, value)
        self.saved.append(name)
        if self._crash_after is not None:
            self._crash_after -= 1
            if self._crash_after == 0:
                raise Crash
        return stands

    async def load_unit(self, key: StepKey, name: str) -> bytes | None:
        self.read += 1
        return await self.store.load_unit(key, name)

    async def load_units(self, key: StepKey) -> dict[str, bytes]:
        self.read += 1
        return await self.store.load_units(key)

    async def take_signal(
        self, key: StepKey, unit: str, name: str, *, otherwise: bytes | None = None
    ) -> bytes | None:
        return await self.store.take_signal(key, unit, name, otherwise=otherwise)

    async def open_request(self, request: Request) -> bool:
        return await self.store.open_request(request)


def scripted(*turns: Callable[[list[ModelMessage]], Any] | Any) -> tuple[FunctionModel, list[int]]:
    """A model that answers its first request with the first turn, the second with the second, and a list of its calls.

    A turn is a text, a tool call, a list of tool calls, or a function that makes one of these of the messages. Which
    turn it is follows from the messages alone, as for a real model.
    """
    calls: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        number = sum(isinstance(message, ModelResponse) for message in messages)
        calls.append(number)
        turn = turns[number]
        answer = turn(messages) if callable(turn) else turn
        parts = answer if isinstance(answer, list) else [answer]
        return ModelResponse(parts=[TextPart(part) if isinstance(part, str) else part for part in parts])

    return FunctionModel(respond), calls


def called(tool: str, call: str, **arguments: Any) -> ToolCallPart:
    """A model's call of a tool under an id."""
    return ToolCallPart(tool, arguments, tool_call_id=call)


def returned(messages: list[ModelMessage]) -> dict[str, Any]:
    """What each tool call gave back, by its id; a call to try again by the text that asks for it."""
    found: dict[str, Any] = {}
    for message in messages:
        if isinstance(message, ModelRequest):
            for part in message.parts:
                if isinstance(part, ToolReturnPart):
                    found[part.tool_call_id] = part.content
                elif isinstance(part, RetryPromptPart):
                    found[part.tool_call_id] = f"retry: {part.content}"
    return found


def prompt_of(messages: list[ModelMessage]) -> str:
    """What the user said last."""
    return next(
        str(part.content)
        for message in reversed(messages)
        if isinstance(message, ModelRequest)
        for part in message.parts
        if isinstance(part, UserPromptPart)
    )


def asks(text: str) -> Callable[[list[ModelMessage]], str]:
    """A turn that says `text` and what it was asked."""
    return lambda messages: f"{text} {prompt_of(messages)}"


def without_moments(messages: bytes) -> str:
    """Messages as JSON without the moments at which they were made."""
    return re.sub(r'"timestamp":"[^"]*"', '"timestamp":""', messages.decode())
