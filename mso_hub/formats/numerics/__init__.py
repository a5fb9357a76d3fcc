"""The arithmetic room: codes and scales, nothing about names, files or configs.

    module      what enters -> what leaves
    floats      stored BF16 / F16 / F32 / E4M3 numbers <-> float32; largest magnitude; NaN and Inf
    nvfp4       numbers <-> packed E2M1 codes + E4M3 block scales (fast, numba)
    integer     packed 2- to 8-bit integers + scales -> numbers (fast, numba)
    reference   the same once more in plain torch: slow, explained, byte-identical
    kernel      how a Python function becomes one of our compiled kernels

Data are numpy arrays together with the dtype tag of the safetensors header, because numpy has
no bfloat16: "BF16" travels as its uint16 bits, "F16" as float16, "F32" as float32.
Kernels run on one thread and release the GIL; the caller brings the threads.
Only `reference` imports torch, and nobody but tests and `verify` imports `reference`.
"""
