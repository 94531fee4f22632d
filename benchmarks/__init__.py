"""Benchmarks of the ops and networks, run from the repository: ``python -m benchmarks.bench_<op>``.

They share the tests' shapes, inputs and tolerance rule, those of ``tests.support``.
"""
