"""Readers of packed weights: stored tensors of one module -> blocks of its rows as numbers.

    table       START HERE: the table of layouts, names and dtypes -> reader
    announced   config.json -> what it says of a module; it must not contradict the tensors
    base        what every reader shares: stored tensors, the size of what a scale covers
    fp8         E4M3 under scales of tensors, rows, groups or blocks
    mx          MXFP4, MXFP8, gpt-oss
    nvfp4       E2M1 under E4M3 under F32
    int8        integers of a byte, and ModelOpt's two rows in a byte
    packed_int  compressed-tensors' integers in I32 words
    awq_gptq    AWQ's and GPTQ's integers in I32 words
    kt          kt-kernel's experts, which are several tensors with names of their own
    smoothed    ModelOpt's smoothing scale on top of any of them

Readers know shapes, not arithmetic: that is in `numerics`.
"""
