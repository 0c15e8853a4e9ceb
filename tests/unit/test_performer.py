"""What an attempt leaves behind when it has failed: nothing of what its activity had in its hands."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Iterator

import pytest
from pydantic_ai import Agent, ModelRetry
from pydantic_ai.models.test import TestModel
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Run, StepContext, Workflow
from paigeant.claim import Claim
from paigeant.slip import RunStatus
from paigeant.testing import MemoryApp


class Large:
    """Stands for what takes memory."""


class Failing:
    """Activities that have something large when they fail; `had` is what is still there of it, of `made` in all."""

    def __init__(self) -> None:
        self.activity = activity = ActivityRegistry()
        self.had: weakref.WeakSet[Large] = weakref.WeakSet()
        self.made = 0

        @activity.execute
        async def fails() -> None:
            large = self.large()
            raise ValueError(repr(large))

        @activity.execute
        async def fails_for_a_reason() -> None:
            large = self.large()
            try:
                raise KeyError(repr(large))
            except KeyError as exc:
                raise ValueError("no") from exc

        @activity.execute
        def fails_in_a_thread() -> None:
            large = self.large()
            raise ValueError(repr(large))

        @activity.execute(timeout=0.01)
        async def takes_too_long() -> str:
            large = self.large()
            await asyncio.Event().wait()
            return repr(large)

        @activity.execute
        async def fails_in_a_unit(ctx: StepContext) -> None:
            async def work() -> None:
                large = self.large()
                raise ValueError(repr(large))

            await ctx.once("work", work)

        @activity.execute
        async def waits(ctx: StepContext) -> str:
            large = self.large()
            await ctx.wait_for("go")
            return repr(large)

        @activity.execute
        async def waits_in_a_unit(ctx: StepContext) -> str:
            async def work() -> str:
                large = self.large()
                await ctx.ask("which?")
                return repr(large)

            return str(await ctx.once("work", work))

        @activity.execute
        async def is_undone() -> None: ...

        @activity.compensate("is_undone")
        async def fails_to_undo() -> None:
            large = self.large()
            raise ValueError(repr(large))

        for name, error in (("an_agent_fails", ValueError), ("an_agent_gives_up", ModelRetry)):
            activity.agent(self.agent(name, error), name=name, prompt="Go")

    def agent(self, name: str, error: type[Exception]) -> Agent[None, str]:
        """One whose tool raises that."""
        agent = Agent(TestModel(), name=name, retries=0)

        @agent.tool_plain
        async def tool() -> None:
            large = self.large()
            raise error(repr(large))

        return agent

    def large(self) -> Large:
        """A new one."""
        large = Large()
        self.had.add(large)
        self.made += 1
        return large


def claims(run: Run) -> list[Claim]:
    """The claims of a run that are still there, with their messages and so with all that it has.

    Those of others may be there for good: an error that is a parameter of another test keeps its traceback.
    """
    return [each for each in gc.get_objects() if isinstance(each, Claim) and each.key.workflow_id == run.id]


@pytest.fixture
def _no_other_hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is in a circle stays, and no log of the tests keeps an error."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_other_hold")
@pytest.mark.parametrize(
    "name",
    [
        *("fails", "fails_for_a_reason", "fails_in_a_thread", "takes_too_long", "fails_in_a_unit"),
        *("is_undone", "an_agent_fails", "an_agent_gives_up"),
    ],
)
async def test_a_failed_attempt_keeps_nothing(name: str) -> None:
    """The garbage collector looks seldom: what hundreds of failures have had would be there at once."""
    failing = Failing()
    async with MemoryApp(failing.activity, retries=1, retry_base=1.0) as app:
        run = await app.dispatch(Workflow("w", [name, "fails"]))
        await app.drain()
        assert (await run.wait(PATIENCE)).status in (RunStatus.FAILED, RunStatus.COMPENSATION_FAILED)
    assert failing.made
    assert not failing.had
    assert not claims(run)


@pytest.mark.usefixtures("_no_other_hold")
@pytest.mark.parametrize("name", ["waits", "waits_in_a_unit"])
async def test_an_attempt_that_waits_keeps_nothing(name: str) -> None:
    """Ten thousand may wait: the worker forgets what each had in its hands."""
    failing = Failing()
    async with MemoryApp(failing.activity) as app:
        run = await app.dispatch(Workflow("w", [name]))
        await app.drain()
        assert await run.status() is RunStatus.WAITING
        assert failing.made
        assert not failing.had
        assert not claims(run)
