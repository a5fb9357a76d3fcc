"""ModelOpt's own NVFP4 quantizer, for `verify --reference modelopt` and the tests. Its import takes ten seconds."""

from __future__ import annotations

import numpy as np

from mso_hub.errors import VerifyError
from mso_hub.formats.numerics.floats import Array, widen


def encode(values: Array, dtype: str, global_scale: np.float32) -> tuple[Array, Array]:
    """Codes U8 [N, K/2] and E4M3 scale bits [N, K/16] as `NVFP4QTensor.quantize` makes them.

    values  [N, K] held as `floats.storage(dtype)`; VerifyError when ModelOpt is not installed
    """
    try:
        import torch
        from modelopt.torch.quantization.qtensor import NVFP4QTensor
    except ImportError as error:
        raise VerifyError(
            f"--reference modelopt needs nvidia-modelopt ({error}); pip install mso-hub[modelopt]"
        ) from error
    if dtype == "BF16":
        weight = torch.from_numpy(np.ascontiguousarray(values)).view(torch.bfloat16)
    else:
        weight = torch.from_numpy(np.ascontiguousarray(values if dtype == "F16" else widen(values, dtype)))
    scale_2 = torch.tensor(float(global_scale), dtype=torch.float32)
    quantized, scale, _ = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=scale_2)
    return quantized._quantized_data.numpy(), scale.view(torch.uint8).numpy()  # noqa: SLF001 - it has no accessor
