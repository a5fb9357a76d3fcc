"""Conversions in a notebook: one object that shows its plan, its progress and its report; a panel over the same object.

    job.py       START HERE: Job, what enters a cell
    settings.py  the words of Job -> Recipe, HubTarget, engine
    panes.py     what a cell shows, twice: HTML and complete text of 80 columns
    plan.py      Plan -> its pane; estimate.py what a run will take, measured on a few MB
    report.py    Report -> its pane; heat.py errors by layer and projection, plot.py the same as a picture
    track.py     events -> what is going on; views.py show it while it goes on
    panel.py     the widgets that press the buttons of a Job
    calibration.py  a model over text: statistics, methods that need some, how well it predicts
    view.py      what other calls return -> panes
    session.py   which Hub the cells talk to: one of their own on this machine, or a real one

IPython, ipywidgets and matplotlib are imported where they are used, and only ipywidgets and matplotlib are asked for.
"""

from __future__ import annotations

from mso_hub.notebook.calibration import calibrate, evaluate, prepare
from mso_hub.notebook.job import Job
from mso_hub.notebook.panel import panel
from mso_hub.notebook.session import Session, use_hub
from mso_hub.notebook.view import plot_formats, view

__all__ = ["Job", "Session", "calibrate", "evaluate", "panel", "plot_formats", "prepare", "use_hub", "view"]
