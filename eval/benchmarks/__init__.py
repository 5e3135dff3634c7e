"""Benchmarks: what is fast, against which baseline, on the machine at hand; `python -m eval.benchmarks.NAME`."""
