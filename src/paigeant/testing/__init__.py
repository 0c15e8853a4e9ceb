"""What users test their workflows with: an application in memory, a clock that they set, and `drain()`. No server.

    from paigeant import ActivityRegistry, RetryPolicy, Workflow
    from paigeant.testing import MemoryApp

    activity = ActivityRegistry()

    @activity.execute(retries=RetryPolicy(attempts=3, base=3600, cap=86400))
    async def charge_card(amount: int) -> str: ...

    async def test_a_declined_card_is_tried_again() -> None:
        async with MemoryApp(activity) as app:
            run = await app.dispatch(Workflow("pay", ["charge_card"]), {"amount": 5})
            await app.drain()  # the hours between the attempts pass at once
            result = await run.wait()
        assert result.status == "completed"

Suites for those who write a transport or a store are in `paigeant.testing.conformance`.
"""

from __future__ import annotations

from paigeant.testing.authority import MemoryAuthority
from paigeant.testing.clock import ManualClock
from paigeant.testing.memory import MemoryApp, NotDrained

__all__ = ["ManualClock", "MemoryApp", "MemoryAuthority", "NotDrained"]
