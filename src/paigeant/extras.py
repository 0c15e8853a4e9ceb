"""How a user gets what an extra of Paigeant brings, as it is installed here."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlsplit

__all__ = ["how_to_install"]


def how_to_install(extra: str) -> str:
    """The command that installs `extra`: from the package index, or from the checkout that this one came from."""
    try:
        told = distribution("paigeant").read_text("direct_url.json")
    except PackageNotFoundError:  # it runs without having been installed
        told = None
    return _command(extra, json.loads(told) if told else {})


def _command(extra: str, origin: dict[str, object]) -> str:
    """`origin` is what the installer has noted (direct_url.json): a folder, or anything else."""
    folder = origin.get("dir_info")
    if not isinstance(folder, dict):
        return f"pip install 'paigeant[{extra}]'"
    path = unquote(urlsplit(str(origin.get("url"))).path)
    return f"pip install {'-e ' if folder.get('editable') else ''}{shlex.quote(f'{path}[{extra}]')}"
