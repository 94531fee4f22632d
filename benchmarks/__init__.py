"""Benchmarks of the ops and networks, run from the repository: ``python -m benchmarks``.

They share the tests' shapes, inputs and tolerance rule, those of ``tests.support``.
"""
