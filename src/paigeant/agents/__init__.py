"""pydantic-ai agents as activities. The only part of the engine that imports pydantic_ai.

`activity.py` runs an agent as one step, `prompt.py` fills its prompt, `durability.py` records what it does inside the
step. `effect_key()` is for tools: a key for the effects of the call that asks for it, the same when it is repeated.
"""

from paigeant.agents.durability import PaigeantDurability, effect_key

__all__ = ["PaigeantDurability", "effect_key"]
