"""Text + checkpoint -> how well it predicts, and how like the one that it was made from.

run           START HERE: evaluate() = two walks -> Evaluation
measure       logits -> perplexity, KL divergence, agreement; block by block
subject       a checkpoint as its runtime would compute it
inputs        its config and scales -> what happens to activations, module by module
activations   the formulas
planned       a checkpoint as a recipe would leave it, without writing it
sensitivity   KL divergence for one group of weights and one format after another
"""

from __future__ import annotations

from mso_hub.calibrate.evaluate.run import Settings, evaluate

__all__ = ["Settings", "evaluate"]
