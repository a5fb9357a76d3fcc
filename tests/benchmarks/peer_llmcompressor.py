"""llm-compressor's model-free NVFP4, in its own environment: `python peer_llmcompressor.py SOURCE TARGET`.

It is run by file name, with another interpreter, and imports nothing of this repository.
"""

from __future__ import annotations

import sys

from llmcompressor import model_free_ptq

IGNORE = ["lm_head", "re:.*embed.*", "re:.*norm.*"]

if __name__ == "__main__":
    model_free_ptq(sys.argv[1], sys.argv[2], scheme="NVFP4A16", ignore=IGNORE, device="cpu")
