"""One bounded hf_xet session per process, and how storage tokens are asked for.

hf_xet sizes its buffers by the machine's memory and repeats failed requests for minutes without a word; here both
are limits of ours, so that memory stays countable and waiting is reported.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, Literal
from urllib.parse import quote

from mso_hub.hub.client import SILENCE, Client

BUFFER, BUFFER_PER_FILE, BUFFER_LIMIT = 64 << 20, 32 << 20, 128 << 20
"""Bytes that hf_xet may hold of downloads: in all to begin with, more for each open file, in all at most."""

UPLOADS = 4
"""Blocks of up to 64 MiB that are on their way up at once."""
M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -3, -1
"""Parameters of mallopt, from malloc.h."""

_SESSIONS: dict[tuple[int, float, int], Any] = {}
_LOCK = threading.Lock()


def xet_enabled() -> bool:
    """Is hf_xet installed, and not switched off by HF_HUB_DISABLE_XET?"""
    from huggingface_hub.utils._runtime import is_xet_available

    return bool(is_xet_available())


def xet_session(silence: float = SILENCE, tries: int = 5) -> Any:
    """The hf_xet.XetSession of this process with these limits; a forked child gets its own.

    silence  seconds without an answer before hf_xet gives up one request
    tries    requests that hf_xet makes before it reports an error
    """
    import hf_xet

    key = (os.getpid(), silence, tries)
    with _LOCK:
        if key not in _SESSIONS:
            _return_memory()
            config = hf_xet.XetConfig()
            known = set(config.keys())
            wanted = _settings(silence, tries)
            _SESSIONS[key] = hf_xet.XetSession(config.with_config({k: v for k, v in wanted.items() if k in known}))
        return _SESSIONS[key]


def _return_memory() -> None:
    """Ask glibc for two arenas and for large blocks by mmap, which go back to the system when they are freed.

    Otherwise each of hf_xet's threads keeps what it once held: peak memory of a run was 1.1 GB instead of 0.7.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another libc has no such hoard
        for parameter, value in ((M_ARENA_MAX, 2), (M_MMAP_THRESHOLD, 1 << 20), (M_TRIM_THRESHOLD, 1 << 20)):
            mallopt(parameter, value)


def _settings(silence: float, tries: int) -> dict[str, Any]:
    """Names as hf_xet has them; older releases do not know all of them."""
    return {
        "reconstruction.download_buffer_size": BUFFER,
        "reconstruction.download_buffer_perfile_size": BUFFER_PER_FILE,
        "reconstruction.download_buffer_limit": BUFFER_LIMIT,
        "client.ac_max_upload_concurrency": UPLOADS,
        "client.connect_timeout": f"{silence * 1000:.0f}ms",
        "client.read_timeout": f"{silence * 1000:.0f}ms",
        "client.retry_max_attempts": tries,
        "client.retry_base_delay": "1s" if tries > 1 else "100ms",
        "telemetry.enabled": False,
    }


def token_refresh(
    client: Client, repo_id: str, kind: Literal["read", "write"], revision: str | None, *, create_pr: bool = False
) -> tuple[str, dict[str, str]]:
    """URL and headers by which hf_xet fetches storage tokens, the first one and those that follow an expired one.

    revision   commit or branch; None where the commit will open a pull request
    create_pr  the token is for a pull request that does not exist yet
    """
    at = quote(str(revision), safe="")
    url = f"{client.endpoint}/api/models/{repo_id}/xet-{kind}-token/{at}" + ("?create_pr=1" if create_pr else "")
    return url, client.headers()


def xet_headers(client: Client) -> dict[str, str]:
    """Headers for the storage itself, which takes its own token: ours must not reach it."""
    return {name: value for name, value in client.headers().items() if name.lower() != "authorization"}
