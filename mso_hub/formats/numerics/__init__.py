"""The arithmetic room: codes and scales, nothing about names, files or configs.

    module      what enters -> what leaves
    floats      stored BF16 / F16 / F32 / E4M3 / E8M0 numbers <-> float32; largest magnitude; NaN and Inf
    nvfp4       numbers <-> packed E2M1 codes + E4M3 block scales; nvfp4_search chooses the scales
    mx          numbers <-> MXFP4 or MXFP8 codes + E8M0 scales; gpt-oss' layout -> numbers
    e2m1        what both have in common: rounding to FP4, packing, squared errors
    fp8         numbers <-> E4M3 codes + scales of rows, blocks or tensors; fp8_search chooses the scales
    integer     packed 2- to 8-bit integers + scales -> numbers
    integer_encode  numbers -> integers, scales, zero points, packed; integer_search chooses the scales
    kt          INT4 and INT8 in kt-kernel's tiles, both ways
    awq_gptq    AutoAWQ's and GPTQ's layouts -> numbers
    modelopt    ModelOpt's own NVFP4 quantizer, for comparison
    cuda        the same bytes on a GPU (Triton)
    reference   the same once more in plain torch: slow, explained, byte-identical
    kernel      how a Python function becomes one of our compiled kernels

Data are numpy arrays together with the dtype tag of the safetensors header, because numpy has
no bfloat16: "BF16" travels as its uint16 bits, "F16" as float16, "F32" as float32.
Kernels run on one thread and release the GIL; the caller brings the threads.
Only `reference`, `modelopt` and `cuda` import torch; nobody but tests imports `reference`.
"""
