"""Crossovers, exponents and speedups on curves with known answers."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from mambench.harness.analysis.results import Result
from mambench.harness.curves import CrossoverKind, Point, crossover, curve, exponent, speedup
from mambench.harness.spec import Case, DType, Family, Outcome, Pass, Problem

LENGTHS = tuple(2**k for k in range(9, 18))


def points(
    time: Callable[[float], float],
    lengths: tuple[int, ...] = LENGTHS,
    noise: float = 0.0,
    seed: int = 0,
    count: int = 31,
) -> list[Point]:
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        samples = time(length) * np.exp(noise * rng.standard_normal(count))
        value = float(np.median(samples)) if count else time(length)
        found.append(Point(seqlen=length, value=value, samples=tuple(samples.tolist())))
    return found


def linear(length: float) -> float:
    return 1e-8 * length


def quadratic(length: float) -> float:
    return 1e-8 * length * length / 3000  # meets `linear` at 3000


def test_crossover_of_power_laws_is_exact():
    # Power laws are lines in log-log, so interpolation has no error of its own.
    found = crossover(points(linear), points(quadratic))
    assert found.kind is CrossoverKind.AT
    assert found.seqlen == pytest.approx(3000)
    assert found.interval == pytest.approx((3000, 3000))
    assert found.bracket == (2048, 4096)
    assert found.range == (512, 131072)


def test_crossover_interpolates_between_different_lengths():
    found = crossover(points(linear), points(quadratic, lengths=(600, 1500, 9000)))
    assert found.seqlen == pytest.approx(3000)
    assert found.range == (600, 9000)


def test_crossover_at_a_measured_length():
    lengths = (1000, 3000, 9000)
    found = crossover(points(linear, lengths), points(quadratic, lengths))
    assert found.kind is CrossoverKind.AT
    assert found.seqlen == pytest.approx(3000)


@pytest.mark.parametrize(
    ("factor", "kind"),
    [(1e3, CrossoverKind.INCUMBENT_FASTER), (1e-3, CrossoverKind.CHALLENGER_FASTER)],
)
def test_none_in_range(factor, kind):
    found = crossover(points(lambda n: factor * linear(n)), points(quadratic))
    assert (found.kind, found.seqlen) == (kind, None)


def test_a_challenger_that_falls_behind_is_not_an_overtaking():
    found = crossover(points(quadratic), points(linear))
    assert found.kind is CrossoverKind.SEVERAL
    assert found.crossings == pytest.approx((3000,))


def test_curves_that_wind_have_several():
    winding = points(lambda n: quadratic(n) * math.exp(4 * math.sin(3 * math.log(n))))
    assert crossover(points(linear), winding).kind is CrossoverKind.SEVERAL


def test_one_common_length_is_no_overlap():
    found = crossover(points(linear, (512, 1024)), points(quadratic, (1024, 2048)))
    assert found.kind is CrossoverKind.NO_OVERLAP


def test_crossover_interval_covers_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        ours = points(linear, noise=0.05, seed=2 * seed)
        theirs = points(quadratic, noise=0.05, seed=2 * seed + 1)
        found = crossover(ours, theirs, seed=seed)
        assert found.interval is not None
        hits += found.interval[0] <= 3000 <= found.interval[1]
    assert 0.90 <= hits / 200 <= 0.995


def test_an_interval_that_leaves_the_range_says_so():
    edge = points(lambda n: linear(n) * 1.0, lengths=(1024, 2048, 2990), noise=0.2, count=9)
    found = crossover(points(quadratic, (1024, 2048, 2990)), edge)
    assert found.kind is not CrossoverKind.NO_OVERLAP
    near_end = points(lambda n: quadratic(n) * 1.005, (1024, 2048, 3000), noise=0.2, count=9)
    level = points(linear, (1024, 2048, 3000), noise=0.2, count=9, seed=5)
    found = crossover(level, near_end)
    assert found.interval is None or found.interval[1] == math.inf


def test_without_samples_there_is_a_bracket_only():
    found = crossover(points(linear, count=0), points(quadratic, count=0))
    assert found.interval is None
    assert found.bracket == (2048, 4096)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_exponent_above_the_floor(power):
    hits = 0
    for seed in range(100):
        found = exponent(points(lambda n: max(2e-5, 1e-8 * n**power), noise=0.01, seed=seed))
        assert found.value == pytest.approx(power, abs=0.02)
        assert found.low is not None
        assert found.high is not None
        assert found.range is not None
        assert found.range[1] == LENGTHS[-1]
        hits += found.low <= power <= found.high
    assert hits >= 88, "a nominal 95 % interval"


def test_a_flat_curve_has_no_exponent():
    found = exponent(points(lambda n: 2e-5))
    assert found.value is None
    assert "too few" in (found.reason or "")
    assert exponent(points(linear, (512, 1024))).value is None


def result(seqlen: int, time_s: float | None, samples: tuple[float, ...] = ()) -> Result:
    problem = Problem(family=Family.S6, batch=1, seqlen=seqlen, d_inner=8, d_state=4)
    case = Case(
        implementation="x", variant="y", problem=problem, pass_=Pass.FORWARD, dtype=DType.FP32
    )
    outcome = Outcome.OK if time_s else Outcome.OOM
    return Result(
        source="s", run_id="r", case=case, outcome=outcome, time_s=time_s, samples_s=samples
    )


def test_curve_leaves_failures_out_and_sorts():
    found = curve([result(1024, 2.0), result(2048, None), result(512, 1.0)])
    assert [(p.seqlen, p.value) for p in found] == [(512, 1.0), (1024, 2.0)]


def test_speedup_and_its_significance():
    rng = np.random.default_rng(0)
    fast, slow = (tuple((c + 0.05 * rng.standard_normal(50)).tolist()) for c in (1.0, 2.0))
    found = speedup(result(8, 1.0, fast), result(8, 2.0, slow))
    assert found is not None
    assert found.ratio == 2.0
    assert found.significant
    same = speedup(result(8, 1.0, fast), result(8, 1.0, fast))
    assert same is not None
    assert not same.significant
    bare = speedup(result(8, 1.0), result(8, 2.0))
    assert bare is not None
    assert not bare.significant, "without samples nothing is significant"
    assert speedup(result(8, None), result(8, 1.0)) is None
