"""Runs the steps of a plan and hands out finished pieces in order. One engine so far: threads on this machine."""

from __future__ import annotations

from mso_hub.engine.assemble import write_pieces
from mso_hub.engine.distance import SAMPLE, WHOLE, Distance, distance
from mso_hub.engine.notes import exactness, note_errors, noted_distances, noted_errors, noted_inexact
from mso_hub.engine.probe import Probe
from mso_hub.engine.threads import Piece, ThreadEngine

__all__ = [
    "SAMPLE",
    "WHOLE",
    "Distance",
    "Piece",
    "Probe",
    "ThreadEngine",
    "distance",
    "exactness",
    "note_errors",
    "noted_distances",
    "noted_errors",
    "noted_inexact",
    "write_pieces",
]
