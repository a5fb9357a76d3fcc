"""vllm_mso_hub: what mso_hub asks of vLLM, run in vLLM's own environment.

    rank  module      what enters -> what leaves
    4     __main__    a job as JSON -> a report as JSON, for `mso-hub smoke`
    3     shapes      headers -> every tensor that a rank would not load as it is stored
    3     generate    a folder -> tokens and log-likelihoods
    2     loader      `--load-format mso_checked`: vLLM's own loader, and an error instead of a partly written model
    2     emulate     kernels for formats that vLLM has none for on a CPU
    1     track       what load_weights reads and writes, element by element
    1     compat      every private name of vLLM, by version
    0     job         the JSON on both sides

A module imports lower ranks and its own room only. vLLM and torch are imported inside functions: vLLM imports this
package in every process that it starts.
"""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Entry point `vllm.general_plugins`, called in every process of vLLM, perhaps more than once."""
