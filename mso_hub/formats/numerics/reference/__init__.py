"""The arithmetic of the kernels in plain torch: slow, readable, byte-identical.

Read these files to understand the formats; run the numba files to get work done. Tests hold the two equal on every
byte, so an explanation here is an explanation of what is written to disk.
"""
