"""Which model repos are there? For somebody who types a few letters of a name."""

from __future__ import annotations

from mso_hub.hub.client import Client

MOST = 20


def search_models(client: Client, text: str, most: int = MOST) -> list[str]:
    """Ids of at most `most` model repos whose name has these words, as the Hub orders them."""
    what = f"search for {text!r}"
    return client.attempt(lambda: [str(m.id) for m in client.api.list_models(search=text, limit=most)], what=what)
