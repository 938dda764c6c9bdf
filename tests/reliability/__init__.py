"""What breaks on purpose, and what has to hold then: faults, kills, load, fuzzing against real processes.

`python -m reliability` (with `tests` on the path) runs all of it and writes `benchmarks/results/reliability.json`;
`tests/test_reliability.py` runs the short form. docs/reliability.md is the card that is made of the result.
"""
