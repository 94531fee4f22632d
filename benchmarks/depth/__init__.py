"""Why the five networks are built as they are, tried on scikit-learn's digits.

``python -m benchmarks depth`` trains small networks of cvkernels' blocks, several seeds of each,
and writes what it found to ``benchmarks/results/depth``.
"""
