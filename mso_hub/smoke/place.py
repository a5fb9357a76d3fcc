"""Where the plugin's sources lie: in a checkout beside the package, in a wheel inside of it."""

from __future__ import annotations

from pathlib import Path

from mso_hub.errors import SmokeError

PACKAGE = "vllm_mso_hub"
_HOUSE = Path(__file__).resolve().parents[1]
PLACES = (_HOUSE / "_vllm_plugin" / "src", _HOUSE.parent / "plugins" / "vllm-mso-hub" / "src")


def plugin_sources() -> Path:
    """The folder that a Python needs on its path to run `python -m vllm_mso_hub`; SmokeError where there is none."""
    for place in PLACES:
        if (place / PACKAGE / "__init__.py").is_file():
            return place
    raise SmokeError(f"{PACKAGE}: must lie in {PLACES[0]}, found nothing there; install mso-hub again")
