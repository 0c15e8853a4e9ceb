"""What an adapter must do: one suite a contract, for ours and for anybody's. Needs pytest and pytest-asyncio.

    from paigeant.testing.conformance import TransportConformance

    class TestMyTransport(TransportConformance):
        def make(self) -> Transport:
            return MyTransport(self.place, clock=self.clock)

        async def deliver_raw(self, transport, topic, message_id, body): ...

Each test is one promise of the contract's docstrings. What an adapter can't do it says in the attributes of its class.
"""

from __future__ import annotations

import pytest

for name in ("transports", "stores", "leases", "waits", "values", "history", "bench"):
    pytest.register_assert_rewrite(f"{__name__}.{name}")

from paigeant.testing.conformance.stores import StoreConformance  # noqa: E402  # rewriting has to come first
from paigeant.testing.conformance.transports import TransportConformance  # noqa: E402

__all__ = ["StoreConformance", "TransportConformance"]
