"""The fault bench: small models, faults forked from healthy runs, every signal scored alike.

`python -m benchmarks.detection run --folder F --workers 2` makes all runs and resumes where it stopped;
`python -m benchmarks.detection report --folder F` scores them and writes benchmarks/results/detection.*.
"""
