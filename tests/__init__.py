"""Tests of mso_hub; a package so that `python -m tests.benchmarks...` finds this folder and no other."""
