"""Headers + recipe -> exact output layout. No weight is read and torch is never imported here."""

from __future__ import annotations

from mso_hub.plan.planner import Plan, ShardPlan, Step, plan_checkpoint
from mso_hub.plan.recipe import Recipe

__all__ = ["Plan", "Recipe", "ShardPlan", "Step", "plan_checkpoint"]
