"""Benchmarks, which `make bench` runs and the test suite leaves out."""
