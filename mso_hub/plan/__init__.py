"""Headers + recipe -> exact output layout. No weight is read and torch is never imported here."""

from __future__ import annotations

from mso_hub.plan.planner import Plan, plan_checkpoint
from mso_hub.plan.recipe import Recipe, Rule
from mso_hub.plan.shards import ShardPlan
from mso_hub.plan.steps import Step

__all__ = ["Plan", "Recipe", "Rule", "ShardPlan", "Step", "plan_checkpoint"]
