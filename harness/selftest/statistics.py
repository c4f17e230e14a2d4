"""How often the intervals cover what they claim to, simulated with known noise. Imports no torch.

An interval that claims 95 % is shown to cover the true median in 93 to 97 % of at least 2,000
draws, whatever the noise: normal, skewed, of two modes, and drifting. It is asked twice: over a
fixed number of samples, and with the sampling ended by the criterion that ends it in a run, where
looking at the interval in order to stop costs coverage. What the simulation does not hold are
samples that depend on their neighbours beyond a drift: those are why rounds are fresh processes.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

from mambench.harness.instruments import timing
from mambench.harness.selftest import run as selftest
from mambench.harness.spec import Settings

DRAWS = 4000
FIXED_SAMPLES = 30
LOW, HIGH = 0.93, 0.97
SAMPLE_S = 1e-3
SPREAD = 0.02
DRIFT = 2e-4  # of the level, per sample
MODES = ((0.6, 1.0, 0.005), (0.4, 1.05, 0.005))  # weight, level, spread


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Samples of a known distribution.

    `draw` returns the i-th sample; `median` is the true median of the first n together.
    """

    name: str
    draw: Callable[[random.Random, int], float]
    median: Callable[[int], float]


def noises() -> tuple[Noise, ...]:
    """Return the four kinds of noise."""
    two_modes = _mixture_median()
    return (
        Noise(name="normal", draw=lambda r, i: r.gauss(1.0, SPREAD), median=lambda n: 1.0),
        Noise(
            name="lognormal", draw=lambda r, i: math.exp(r.gauss(0.0, 0.1)), median=lambda n: 1.0
        ),
        Noise(name="bimodal", draw=_bimodal, median=lambda n: two_modes),
        # Levels that rise steadily are symmetric about their middle, and so is their mixture.
        Noise(
            name="drifting",
            draw=lambda r, i: r.gauss(1.0 + DRIFT * i, SPREAD),
            median=lambda n: 1.0 + DRIFT * (n - 1) / 2,
        ),
    )


def coverage(draws: int = DRAWS) -> Iterator[selftest.Check]:
    """Yield a check per kind of noise and way to stop; always the same draws."""
    fixed = f"{FIXED_SAMPLES} samples"
    for how, sample in ((fixed, _fixed), ("stopped by the criterion", _stopped)):
        for noise in noises():
            source = random.Random(f"{how} {noise.name}")
            hits, total = 0, 0
            for _ in range(draws):
                n, interval = sample(source, noise)
                total += n
                hits += interval is not None and interval[0] <= noise.median(n) <= interval[1]
            yield selftest.between(
                "intervals",
                f"coverage of a 95 % interval, {noise.name} noise, {how}",
                low=LOW,
                high=HIGH,
                got=hits / draws,
                show=selftest.percent,
                unit="frac",
                note=f"{draws:,} draws of {total / draws:.0f} samples",
            )


def _fixed(source: random.Random, noise: Noise) -> tuple[int, tuple[float, float] | None]:
    samples = [noise.draw(source, i) for i in range(FIXED_SAMPLES)]
    return FIXED_SAMPLES, timing.median_interval(samples)


def _stopped(source: random.Random, noise: Noise) -> tuple[int, tuple[float, float] | None]:
    """Sample as a run with the default settings would, but never for want of time."""
    criterion = timing.Criterion(timing.StopRule.of(Settings(target_s=math.inf), math.inf))
    samples: list[float] = []
    while batch := criterion.batch():
        for _ in range(batch):
            samples.append(noise.draw(source, len(samples)))
            criterion.add(samples[-1], SAMPLE_S)
    return len(samples), criterion.report()["interval_s"]


def _bimodal(source: random.Random, i: int) -> float:
    (weight, *first), (_, *second) = MODES
    level, spread = first if source.random() < weight else second
    return source.gauss(level, spread)


def _mixture_median() -> float:
    """Return the median of the two modes together, by bisection."""
    low, high = min(mode[1] for mode in MODES) - 1, max(mode[1] for mode in MODES) + 1
    for _ in range(100):
        middle = (low + high) / 2
        below = sum(w * NormalDist(level, spread).cdf(middle) for w, level, spread in MODES)
        low, high = (middle, high) if below < 0.5 else (low, middle)
    return low
