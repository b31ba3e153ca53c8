"""Benchmarks: our adapter against its peers, all in one process (`python -m benchmarks.speed --help`)."""
