"""Intervals of the quality benchmark: against tables and by hand."""

from __future__ import annotations

import pytest

from benchmarks import intervals


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.7062), (4, 2.7764), (23, 2.0687), (120, 1.9799), (1000, 1.9623)])
def test_t_quantile_is_the_tabulated_one(degrees: int, t: float) -> None:
    assert intervals.t_quantile(degrees) == pytest.approx(t, abs=1e-4)


def test_interval_by_hand() -> None:
    found = intervals.interval([1.0, 2.0, 3.0, 4.0])
    assert found is not None and found.mean == 2.5 and found.n == 4
    assert found.half == pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2, rel=1e-5)
    assert intervals.interval([7.0]) == intervals.Interval(7.0, None, 1)
    with pytest.raises(ValueError, match="needs a value"):
        intervals.interval([])
    assert intervals.paired_difference({("a", 0): 1.0}, {("a", 1): 2.0}) == {}


def test_paired_difference_takes_only_pairs_and_averages_seeds_first() -> None:
    ours = {("a", 0): 3.0, ("a", 1): 5.0, ("b", 0): 2.0, ("c", 0): 9.0}
    peer = {("a", 0): 1.0, ("a", 1): 1.0, ("b", 0): 1.0, ("d", 0): 0.0}
    found = intervals.paired_difference(ours, peer)  # differences 2, 4 and 1; by subject 3 and 1
    cells, subjects = found["cells"], found["subjects"]
    assert cells is not None and cells.mean == pytest.approx(7 / 3) and cells.n == 3
    assert subjects is not None and subjects.mean == 2.0 and subjects.n == 2
    assert subjects.half == pytest.approx(12.7062 * 1.0, rel=1e-4)  # sd √2 over √2
