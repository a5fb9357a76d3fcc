"""Headers of a folder, a repo or a plan -> what vLLM would not load, asked of vLLM itself, in its own Python."""

from __future__ import annotations

from mso_hub.smoke.place import plugin_sources
from mso_hub.smoke.python import python_of_vllm
from mso_hub.smoke.report import Problem, ShapeReport, World
from mso_hub.smoke.run import SIZES, prove

__all__ = ["SIZES", "Problem", "ShapeReport", "World", "plugin_sources", "prove", "python_of_vllm"]
