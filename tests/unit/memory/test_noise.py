"""What a judge that errs does to memories: our policy beside the one that is replaced. Figures: benchmarks/RESULTS.md."""

from __future__ import annotations

import pytest

from tests.support.noise import run


def test_with_a_true_judge_nothing_is_lost_doubled_or_contradicted() -> None:
    assert run("set-3", 0.0, seed=1).per_thousand() == {
        "wrong_closes": 0, "contradictions": 0, "duplicates": 0, "lost": 0
    }


@pytest.mark.parametrize("flips", [0.01, 0.05, 0.1, 0.2])
def test_fewer_contradictions_survive_than_by_the_legacy_policy(flips: float) -> None:
    ours = [run("set-3", flips, seed=seed) for seed in range(5)]
    theirs = [run("legacy", flips, seed=seed) for seed in range(5)]
    assert sum(each.contradictions for each in ours) < sum(each.contradictions for each in theirs)
    assert sum(each.duplicates for each in ours) <= sum(each.duplicates for each in theirs)
    assert sum(each.lost for each in ours) < sum(each.lost for each in theirs)
    assert sum(each.wrong_closes for each in ours) < sum(each.wrong_closes for each in theirs)
    if flips <= 0.05:
        assert sum(each.lost for each in ours) == 0
