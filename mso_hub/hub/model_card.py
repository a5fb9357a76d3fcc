"""README.md of a model repo: YAML between two `---` lines, then text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mso_hub.hub.address import Address
from mso_hub.hub.client import Client


def split_card(content: str) -> tuple[dict[str, Any], str]:
    """(metadata, text); metadata that is no YAML mapping counts as absent, as the Hub ignores it too."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        card = ModelCard(content, ignore_metadata_errors=True)
    except (ValueError, YAMLError):
        return {}, content.partition("\n---")[2] if content.startswith("---") else content
    return dict(card.data.to_dict()), card.text.lstrip("\n")


def join_card(metadata: dict[str, Any], text: str) -> str:
    """README.md with the metadata on top, keys in the order given."""
    from huggingface_hub.repocard_data import CardData

    return f"---\n{CardData(**metadata).to_yaml()}\n---\n\n{text}"


def commit_texts(client: Client, address: Address, parent: str, files: Mapping[str, bytes], title: str) -> str:
    """Commit small files on top of a known head -> URL of the commit; HubError when the head moved meanwhile."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    commit = client.attempt(
        lambda: client.api.create_commit(
            address.repo_id, operations, commit_message=title, revision=address.revision, parent_commit=parent
        ),
        what=str(address),
    )
    return str(commit.commit_url)
