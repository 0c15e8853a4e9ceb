"""pydantic-ai agents as activities. The only part of the engine that imports pydantic_ai.

`activity.py` runs an agent as one step, `prompt.py` fills its prompt, `conversation.py` keeps its conversation for
later steps, `usage.py` counts what it uses, `plans.py` lets it plan further steps, `durability.py` records what it does
inside a step. `effect_key()` is for tools: a key for the effects of the call that asks for it, the same when that call
is repeated.
"""

from paigeant.agents.durability import PaigeantDurability, effect_key
from paigeant.agents.plans import Handoff

__all__ = ["Handoff", "PaigeantDurability", "effect_key"]
