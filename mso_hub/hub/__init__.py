"""The one adapter to huggingface_hub and hf_xet: addresses, tokens, retries, streams in both directions, one commit.

No other room imports those two packages; `devhub` is the other end of the wire, for demos and tests.
"""

from __future__ import annotations

from mso_hub.hub.address import Address, is_address, looks_like_repo, parse_address
from mso_hub.hub.client import Client, Patience
from mso_hub.hub.repository import Origin, RemoteFile, Snapshot, take_snapshot

__all__ = [
    "Address",
    "Client",
    "Origin",
    "Patience",
    "RemoteFile",
    "Snapshot",
    "is_address",
    "looks_like_repo",
    "parse_address",
    "take_snapshot",
]
