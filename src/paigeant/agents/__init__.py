"""pydantic-ai agents as activities. The only part of the engine that imports pydantic_ai.

`activity.py` runs an agent as one step, `prompt.py` fills its prompt. A durable engine, which records each model
request and tool call inside the step, will have its place here beside them.
"""
