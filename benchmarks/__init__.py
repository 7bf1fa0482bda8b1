"""Benchmarks of illada against what people use instead: `python -m benchmarks --help`."""
