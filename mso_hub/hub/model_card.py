"""README.md of a model repo: YAML between two `---` lines, then text."""

from __future__ import annotations

from typing import Any


def split_card(content: str) -> tuple[dict[str, Any], str]:
    """(metadata, text); metadata that is no YAML mapping counts as absent, as the Hub ignores it too."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        card = ModelCard(content, ignore_metadata_errors=True)
    except (ValueError, YAMLError):
        return {}, content.partition("\n---")[2] if content.startswith("---") else content
    return card.data.to_dict(), card.text.lstrip("\n")


def join_card(metadata: dict[str, Any], text: str) -> str:
    """README.md with the metadata on top, keys in the order given."""
    from huggingface_hub.repocard_data import CardData

    return f"---\n{CardData(**metadata).to_yaml()}\n---\n\n{text}"
