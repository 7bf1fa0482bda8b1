"""Benchmarks of illada and of the libraries that people use instead: `python -m benchmarks --help`."""
