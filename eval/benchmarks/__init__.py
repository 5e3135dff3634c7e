"""Benchmarks: what is fast, against which baseline, on the machine at hand; `python -m eval.benchmarks.NAME`.

They are programs that nothing imports, and so alone may import what stands above `eval`.
"""
