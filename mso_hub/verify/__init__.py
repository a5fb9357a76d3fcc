"""Finished checkpoint -> report: does it hold what it promises, and how far is it from where it came from?"""

from __future__ import annotations

from mso_hub.verify.compare import Comparison, compare_checkpoints
from mso_hub.verify.manifest import MANIFEST, has_foreign_card, made_from, read_manifest
from mso_hub.verify.opened import Opened, opening
from mso_hub.verify.report import Report, TensorError
from mso_hub.verify.run import like, verify_checkpoint

__all__ = [
    "MANIFEST",
    "Comparison",
    "Opened",
    "Report",
    "TensorError",
    "compare_checkpoints",
    "has_foreign_card",
    "like",
    "made_from",
    "opening",
    "read_manifest",
    "verify_checkpoint",
]
