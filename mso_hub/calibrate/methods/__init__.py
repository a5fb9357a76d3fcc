"""Methods that need more than a maximum: GPTQ, weighted search, AWQ, SmoothQuant. Begin with `run`."""

from __future__ import annotations

from mso_hub.calibrate.methods.gptq import ACTORDERS, MethodSettings
from mso_hub.calibrate.methods.run import METHODS, Prepared, from_statistics, run

__all__ = ["ACTORDERS", "METHODS", "MethodSettings", "Prepared", "from_statistics", "run"]
