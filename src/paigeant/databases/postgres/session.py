"""The settings of a session, whatever the server's configuration, the database or the user would have them be."""

from __future__ import annotations

__all__ = ["limits", "settings_of"]

_SESSION = {
    # A process that stops in the middle of a transaction must not keep others from its rows for longer.
    "idle_in_transaction_session_timeout": "3s",
    "lock_timeout": "4s",
    "statement_timeout": "12s",
    # Whoever has waited for a lock has to see what was done under it: a signal that its step didn't see wakes nobody.
    "default_transaction_isolation": "read committed",
    # All digits of a time: a listing goes on behind the last one it has shown.
    "extra_float_digits": "1",
    # Nor must a host that is gone. Between statements of a pipeline the server counts no time, it only reads.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    # Every statement has an index to go by. Plans are made while tables are small, and kept when they no longer are.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
_UNHURRIED = ("statement_timeout", "idle_in_transaction_session_timeout")
"""What may take as long as it needs where tables are made or changed: a migration, and an answer to its question."""

_LIMITED_SINCE = {"idle_session_timeout": 140000, "transaction_timeout": 170000}


def limits(server_version: int) -> list[str]:
    """The settings by which a server of this version may end sessions and transactions that are as they should be."""
    return [name for name, since in _LIMITED_SINCE.items() if server_version >= since]


def settings_of(server_version: int, *, plain: bool) -> dict[str, str]:
    """What a session has set at a server of this version. `plain`: that of somebody who makes or changes tables."""
    # The next commit would meet a closed connection, and couldn't tell that from one that is cut.
    unlimited = dict.fromkeys(limits(server_version), "0")
    return unlimited | (dict.fromkeys(_UNHURRIED, "0") if plain else _SESSION)
