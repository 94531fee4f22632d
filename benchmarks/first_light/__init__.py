"""``python -m benchmarks first_light``: what a GPU has to say about all this, in nine minutes.

:mod:`runner` runs the steps of :mod:`steps` in turn, each in a process of its own
(:mod:`child`) with a time limit of its own, and writes each item of a step into
``first_light.json`` (:mod:`saved`) as soon as it is measured. A second run goes on where the first
one ended. The other modules are what the steps measure: each has ``items(setting)``, pairs of a
name and of a function that returns a dict. ``benchmarks/results/h200/NOTES.md`` says how to run it
and what to conclude from it.
"""
