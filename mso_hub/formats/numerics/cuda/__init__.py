"""The kernels once more for CUDA, written in Triton: the same bytes as the numba ones.

module    function                                   what enters -> what leaves
floats    amax(values)                               numbers -> largest magnitude
nvfp4     encode(values, global_scale, search=)      numbers -> packed E2M1 codes + E4M3 block scales
          decode(packed, scale, multiplier, dtype)   ModelOpt's layout -> numbers
          decode_divided(packed, scale, divisor, dtype)   compressed-tensors' layout -> numbers
"""
