"""ModelOpt's NVFP4 class over the matrices of a checkpoint, for a bounded time; prints one line of JSON.

    python -m tests.benchmarks.peer_modelopt FOLDER --seconds 60

Only `NVFP4QTensor.quantize` is on the clock: import, reading and writing are not. `bytes` were quantized in
`seconds`; `matrices` is the size of all that a whole run would quantize.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors import safe_open

LEFT_ALONE = ("lm_head.weight", "model.embed_tokens.weight")


def main() -> None:
    """Quantize matrices until the time is up or the checkpoint ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()

    nbytes, matrices, seconds = 0, 0, 0.0
    for path in sorted(options.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict: it has no iterator)
                shape = shard.get_slice(name).get_shape()
                if len(shape) != 2 or name in LEFT_ALONE:
                    continue
                matrices += 2 * math.prod(shape)
                if seconds >= options.seconds:
                    continue
                weight = shard.get_tensor(name)
                start = time.perf_counter()
                NVFP4QTensor.quantize(weight, 16)
                seconds += time.perf_counter() - start
                nbytes += weight.nbytes
    print(json.dumps({"bytes": nbytes, "seconds": seconds, "matrices": matrices}))


if __name__ == "__main__":
    main()
