"""Benchmarks: our adapter against its peers, all in one process (`python -m benchmarks.speed --help`)."""


class BenchError(ValueError):
    """Something that stops a benchmark and that the user can mend; the message says how."""
