"""Model cards as the Hub's own client reads and checks them."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard


def metadata(content: str) -> dict[str, Any]:
    """YAML of a README.md, through the client's own classes."""
    data: Any = ModelCard(content).data
    return dict(data.to_dict())


def validate(content: str) -> None:
    """Ask the Hub that the client knows; ValueError when it does not like the metadata."""
    card: Any = ModelCard(content)
    card.validate()
