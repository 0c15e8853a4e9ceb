"""A document goes through agents: one analyses it, one goes on with that conversation and sums it up.

In one process, for a look:

    python examples/document_pipeline.py

As a service and a client, in two terminals:

    paigeant run examples/document_pipeline.py
    paigeant dispatch document_pipeline report.json --handlers examples/document_pipeline.py --wait

with report.json holding {"text": "...", "audience": "engineers", "sentences": 2}. It runs without a key, since a small
function stands in for the language model; with DOCUMENT_MODEL=openai:gpt-5-mini (or another of pydantic-ai's models) in
the environment of the worker a real one does it.
"""

import asyncio
import os
import re
from collections import Counter

from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelMessage, ModelResponse, RunContext, TextPart, ToolCallPart
from pydantic_ai.messages import UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from paigeant import ActivityRegistry, Paigeant, Settings, Step, StepContext, Workflow


class Report(BaseModel):
    """The input of a run."""

    text: str = Field(min_length=1)
    audience: str = "everybody"
    sentences: int = Field(default=2, gt=0)


class Analysis(BaseModel):
    """What the first agent finds."""

    topics: list[str]
    urgent: bool


class Style(BaseModel):
    """What the second agent has to know besides the text: those fields of the input that have these names."""

    audience: str
    sentences: int


def offline(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Stands in for a language model: picks words and sentences out of the first prompt of the conversation."""
    prompts = [
        part.content for message in messages for part in message.parts if isinstance(part, UserPromptPart)
    ]
    text = str(prompts[0]).partition("\n\n")[2]
    counts = Counter(word.lower() for word in re.findall(r"\w{6,}", text))
    if info.output_tools:
        topics = [word for word, _ in counts.most_common(2)]
        found = {"topics": topics, "urgent": "danger" in text.lower()}
        return ModelResponse(parts=[ToolCallPart(info.output_tools[0].name, found)])
    wanted = int(re.findall(r"\d+", info.instructions or "1")[0])
    sentences = re.split(r"(?<=[.!?])\s+", text)
    ranked = sorted(sentences, key=lambda one: -sum(counts[word.lower()] for word in re.findall(r"\w+", one)))
    return ModelResponse(parts=[TextPart(" ".join(sorted(ranked[:wanted], key=sentences.index)))])


model = os.environ.get("DOCUMENT_MODEL") or FunctionModel(offline, model_name="offline")
analyst = Agent(model, name="analyse", output_type=Analysis)
writer = Agent(model, name="summarise", deps_type=Style)


@writer.instructions
def in_style(ctx: RunContext[Style]) -> str:
    """What is to be written, and for whom."""
    return f"Write {ctx.deps.sentences} sentences for {ctx.deps.audience}."


activity = ActivityRegistry()


@activity.execute()
def clean(text: str) -> str:
    """The text without line breaks. A plain function is done in a thread."""
    return " ".join(text.split())


# {clean} is what the step `clean` returned. The output is the agent's: an Analysis.
activity.agent(analyst, prompt="What is this about, and is it urgent?\n\n{clean}", timeout=60)

# Goes on where `analyse` stopped, so that the text need not be sent again; on another worker, if need be.
activity.agent(writer, prompt="Sum it up.", message_history="analyse", deps=Style, timeout=60)


@activity.execute()
async def alert(analyse: Analysis, ctx: StepContext) -> str:
    """Tell somebody. The key lets the pager tell a second attempt from a second alert."""
    ctx.log.info("alert %s about %s", ctx.idempotency_key, ", ".join(analyse.topics))
    return f"alerted: {analyse.topics[0]}"


@activity.execute()
async def publish(summarise: str, analyse: Analysis, audience: str) -> str:
    """The page, from what the agents gave."""
    return f"# {', '.join(analyse.topics)}\n\n{summarise}\n\n(for {audience})"


document_pipeline = Workflow(
    "document_pipeline",
    ["clean", "analyse", Step("alert", when="analyse.urgent"), "summarise", "publish"],
    input_model=Report,
)

TEXT = """The bridge over the Aske was closed on Monday. An inspection found a crack in the northern bearing of the
bridge, and there is a danger that the bearing gives way under load. A diversion is signposted. The bearing will be
replaced by the end of the month, and the bridge opens again after a test with loaded trucks."""


async def main() -> None:
    """One report, with the worker in this process and all in memory."""
    settings = Settings(transport_url="memory://", store_url="memory://")
    async with Paigeant(settings, activities=activity, workflows=[document_pipeline]) as app:
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        run = await app.dispatch(document_pipeline, Report(text=TEXT, audience="drivers"))
        result = await run.wait(timeout=300)
        print(result.output or result.error)  # noqa: T201  # an example talks
        await worker.stop()
        await working


if __name__ == "__main__":
    asyncio.run(main())
