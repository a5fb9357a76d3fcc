"""Benchmarks: each module is a program that prints one Markdown table.

bench_convert   time and memory of one conversion, beside `cp` and the other tools
bench_memory    peak memory does not grow with the size of a shard
bench_startup   how long the command line takes before it does any work
"""
