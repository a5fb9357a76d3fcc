"""Headers + recipe -> exact output layout. No weight is read and torch is never imported here."""

from __future__ import annotations

from mso_hub.plan.planner import Plan, ShardPlan, Step, make_plan
from mso_hub.plan.recipe import Recipe

__all__ = ["Plan", "Recipe", "ShardPlan", "Step", "make_plan"]
