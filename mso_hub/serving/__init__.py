"""What a GPU makes of a checkpoint, from headers and config: kernels, memory per rank, the line that serves it."""

from __future__ import annotations

from mso_hub.serving.check import Rank, Served, serve_check
from mso_hub.serving.gpus import GPUS, Gpu, find_gpu

__all__ = ["GPUS", "Gpu", "Rank", "Served", "find_gpu", "serve_check"]
