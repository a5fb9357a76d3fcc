"""`python -m mso_hub.cli`, for environments without scripts on the path."""

from __future__ import annotations

from mso_hub.cli import main

main()
