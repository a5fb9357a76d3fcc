"""Put a folder into a repo of a development Hub, the way its users would: with the plain client."""

from __future__ import annotations

from pathlib import Path

from mso_hub.hub.client import Client
from mso_hub.hub.devhub import DevHub


def connect(hub: DevHub, role: str = "write") -> Client:
    """A client of this Hub with the default user's token of a role."""
    return Client(hub.endpoint, hub.token(role))


def seed(client: Client, repo_id: str, folder: Path) -> None:
    """Create the repo where it is missing and upload the folder; what is there already is not sent again."""

    def upload() -> None:
        """Both steps may be repeated."""
        client.api.create_repo(repo_id, exist_ok=True)
        client.api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="A checkpoint")

    client.attempt(upload, what=f"hf://{repo_id}")
