"""The kernels once more for CUDA, written in Triton: the same bytes as the numba ones.

    module          function                       what enters -> what leaves
    floats          amax                           numbers -> largest magnitude
    nvfp4           encode                         numbers -> packed E2M1 codes, E4M3 block scales; all searches
                    decode, decode_divided         these, in ModelOpt's or compressed-tensors' layout -> numbers
    fp8             encode_rows, encode_blocks     numbers -> E4M3 codes, scales; absmax and mse
                    encode_tensor                  numbers, one scale -> E4M3 codes
                    decode                         codes, scales -> numbers
    integer_encode  encode                         numbers -> integers, scales, zero points; absmax and mse
                    pack, pack_zero_point          integers of 2 to 8 bits -> words
    integer         unpack, unpack_zero_point      words -> integers
                    decode                         words, scales, zero points -> numbers
                    decode_int8, decode_indexed    integers, scales, zero points -> numbers
    nvfp4_search, fp8_search, integer_search       how scales are chosen, inside the kernels
    transfer        Device.send, fetch             arrays of this machine -> tensors of a GPU, and back

Each function has the name, the arguments and the errors of the one in `numerics`, but takes and gives torch tensors on
a CUDA device, BF16 as torch.bfloat16 and E4M3 as its uint8 bits. So a dtype tag in front of the values is not needed,
and other dtypes are torch's. Global scales and other single numbers are Python floats.

Why the bytes are the same on a GPU: divisions are `tl.div_rn`, the IEEE ones (a plain / is not); `floats.EXACT` keeps
the compiler from fusing a product and a sum; BF16 and E4M3 are rounded with integers; sums of squared errors are added
in the order of the numba kernels. NaN may have other bits than on a CPU; no encoder makes one.

Importing a module here imports triton, 3.6 or later, and nothing else in the package does. Triton comes with CUDA
builds of torch, 3.6 with torch 2.10. With TRITON_INTERPRET=1 in the environment before that, the functions run without
a GPU, on tensors of the CPU: slowly, to check them.
"""
