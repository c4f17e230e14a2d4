"""What the rule does to noise: simulated checks of nothing, and of planted changes. No torch.

    python -P mambench/_start.py harness.check.simulate [RUNS [DOCUMENT]]

prints the table that docs/methodology.md shows, or writes it there between its two marks. Each
simulated check is of 300 cases in 20 families of 15 lengths, with the screening and both
confirmations as `harness.check.rule` has them. Noise is of processes: the value of a round is what
one process would have found.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambench.harness.check import rule as rules
from mambench.harness.check.moderated import special
from mambench.harness.check.rule import Limits, Rule

Array = NDArray[np.float64]
Process = Callable[[int], Array]  # how many processes -> their log times (runs, cases, processes)

BEGIN, END = "<!-- simulation:begin -->", "<!-- simulation:end -->"
CASES, FAMILIES = 300, 20
SPREAD = 0.007  # of processes, as a fraction: the middle case
UNEVEN = 0.4  # of the logarithms of the cases' spreads
STORED_PAIRS = 10
BATCH = 100  # runs at a time, for memory
PLANTED = {0.05: range(0, 3), 0.10: range(3, 6), 0.01: range(6, 36)}  # in 3, 3 and 30 cases


class Noise(StrEnum):
    """How processes differ."""

    NORMAL = "normal"
    HEAVY = "heavy-tailed"  # Student's t with 3 degrees of freedom
    BIMODAL = "bimodal"  # three of ten processes are 3 % slower
    MODES = "half bimodal"  # of three cases in ten, half the processes are 5 % slower
    DRIFT = "drifting"  # 5 % over the check, and a random walk common to all cases
    OUTLIERS = "2 % outliers"  # 5 to 50 % slower
    COMMON = "common"  # 0.5 % that all cases of a process share


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What so many simulated checks ended in."""

    noise: str
    again: bool  # A/A rounds in the same job, instead of stored ones
    runs: int
    alarms: int  # whole checks of equal code in which anything is REGRESSED
    suspects: float  # cases measured again, mean over checks of equal code
    found: Mapping[float, float]  # planted change: share that is REGRESSED

    @property
    def alarm_rate(self) -> float:
        """The share of checks of equal code that raise an alarm."""
        return self.alarms / self.runs

    @property
    def alarm_bound(self) -> float:
        """The rate that is exceeded with 5 % confidence at most."""
        return rate_bound(self.alarms, self.runs)


def rate_bound(alarms: int, runs: int) -> float:
    """Return the upper 95 % bound of a rate (Clopper and Pearson, 1934)."""
    if alarms >= runs:
        return 1.0
    return float(special.betaincinv(alarms + 1, runs - alarms, 0.95))


def figures(noise: Noise, rule: Rule, *, runs: int, again: bool = False, seed: int = 0) -> Figures:
    """Simulate checks of equal code, and as many with planted changes."""
    rng = np.random.default_rng(seed)
    alarms, suspects, tested = 0, 0.0, 0
    found = dict.fromkeys(PLANTED, 0.0)
    while tested < runs:
        batch = min(BATCH, runs - tested)
        process = processes(noise, rng, batch)
        same = _Simulated(process, rng, rule, again=again).regressed()
        alarms += int(same.anything.sum())
        suspects += float(same.suspects.sum())
        changed = _Simulated(process, rng, rule, again=again, planted=_planted()).regressed()
        for planted, where in PLANTED.items():
            found[planted] += float(changed.cases[:, list(where)].mean()) * batch
        tested += batch
    return Figures(
        noise=noise,
        again=again,
        runs=runs,
        alarms=alarms,
        suspects=suspects / runs,
        found={planted: total / runs for planted, total in found.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """What simulated checks of a machine's own rounds ended in."""

    runs: int
    alarms: int  # checks of equal code in which any case is REGRESSED
    found: Mapping[float, float]  # a change planted in one case: share of checks that find it


def resampled(
    logs: Array, rule: Rule, *, runs: int, planted: Sequence[float] = (), seed: int = 0
) -> Resampled:
    """Return what checks on a machine would end in, as far as its own rounds stand for it.

    Args:
        logs: its own log times (cases, processes), each pair of columns an A/A round. Rounds are
            drawn for all cases together, in either order: what is common to cases, or to the two
            processes of a round, stays so.
        rule: the numbers.
        runs: checks to simulate, of equal code and of each change.
        planted: changes, as fractions; each check has one in one of its cases, at random.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    aa = np.broadcast_to(logs[:, 1::2] - logs[:, ::2], (runs, len(logs), logs.shape[1] // 2))

    def judged(change: Array | float) -> NDArray[np.bool_]:
        draw = _drawn(logs, rng, runs)
        return _Simulated(draw, rng, rule, stored=aa, planted=change).regressed().cases

    found: dict[float, float] = {}
    for change in planted:
        where = rng.integers(0, len(logs), runs)
        shifts = np.zeros((runs, len(logs), 1))
        shifts[np.arange(runs), where] = math.log1p(change)
        found[change] = float(judged(shifts)[np.arange(runs), where].mean())
    alarms = int(judged(0.0).any(axis=1).sum())
    return Resampled(runs=runs, alarms=alarms, found=found)


def processes(noise: Noise, rng: np.random.Generator, runs: int) -> Process:
    """Return what draws processes of a machine with this noise."""
    each = SPREAD * np.exp(rng.normal(0, UNEVEN, (runs, CASES, 1)))
    modes = rng.random((runs, CASES, 1)) < 0.3
    steps = rng.standard_normal

    def draw(count: int) -> Array:
        shape = (runs, CASES, count)
        if noise is Noise.HEAVY:  # as wide as the normal one, by the quartiles
            return each * rng.standard_t(3, shape) * (0.6745 / 0.7649)
        x = each * rng.standard_normal(shape)
        if noise is Noise.BIMODAL:
            x += math.log(1.03) * (rng.random(shape) < 0.3)
        elif noise is Noise.MODES:
            x += math.log(1.05) * (modes & (rng.random(shape) < 0.5))
        elif noise is Noise.DRIFT:
            x += math.log(1.05) * np.linspace(0, 1, count)
            x += 0.003 * np.cumsum(steps((runs, 1, count)), axis=-1)
        elif noise is Noise.OUTLIERS:
            x += (rng.random(shape) < 0.02) * rng.uniform(0.05, 0.5, shape)
        elif noise is Noise.COMMON:
            x += 0.005 * steps((runs, 1, count))
        return x

    return draw


def _drawn(logs: Array, rng: np.random.Generator, runs: int) -> Process:
    known = logs.shape[1] // 2

    def draw(count: int) -> Array:
        rounds = count // 2
        picks = np.argsort(rng.random((runs, max(rounds, known))), axis=1)[:, :rounds] % known
        swapped = rng.integers(0, 2, (runs, rounds, 1))
        columns = 2 * picks[..., None] + (swapped ^ np.arange(2))
        return np.moveaxis(logs[:, columns.reshape(runs, count)], 0, 1)

    return draw


def _planted() -> Array:
    change = np.zeros(CASES)
    for planted, where in PLANTED.items():
        change[list(where)] = math.log1p(planted)
    return change[:, None]


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    cases: NDArray[np.bool_]  # (runs, cases)
    anything: NDArray[np.bool_]  # (runs,): a case, a family or a curve
    suspects: NDArray[np.intp]  # (runs,)


class _Simulated:
    """So many checks at once."""

    def __init__(
        self,
        process: Process,
        rng: np.random.Generator,
        rule: Rule,
        *,
        again: bool = False,
        planted: Array | float = 0.0,
        stored: Array | None = None,
    ) -> None:
        self._process, self._rng, self._rule = process, rng, rule
        self._again, self._planted = again, planted
        first, aa = self._measure(rule.rounds)
        if aa is None:
            aa = stored if stored is not None else self._stored()
        self._stages = [
            first,
            *(self._measure(rule.confirm_rounds)[0] for _ in range(rule.confirmations)),
        ]
        self._aa = aa

    def regressed(self) -> _Outcome:
        """Judge cases, families and curves."""
        cases, suspects = self._judge(None, self._rule.case)
        anything = np.asarray(cases.any(axis=1))
        if cases.shape[1] == CASES:
            for weights, limits in ((_MEANS, self._rule.family), (_TILTS, self._rule.exponent)):
                anything |= self._judge(weights, limits)[0].any(axis=1)
        return _Outcome(cases=cases, anything=anything, suspects=suspects.sum(axis=1))

    def _judge(
        self, weights: Array | None, limits: Limits
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        def of(values: Array) -> Array:
            return values if weights is None else weights @ values

        first = rules.screen(of(self._stages[0]), of(self._aa), self._rule, limits)
        standing, before = first.slower, of(self._stages[0])
        for fresh in map(of, self._stages[1:]):
            standing = rules.confirm(fresh, before, first, standing, self._rule, limits)
            before = np.concatenate([before, fresh], axis=-1)
        return standing, first.slower

    def _measure(self, rounds: int) -> tuple[Array, Array | None]:
        """Return d and, with a third arm, A/A differences of the same variance."""
        arms = 3 if self._again else 2
        x = self._process(rounds * arms)
        runs, cases, _ = x.shape
        x = x.reshape(runs, cases, rounds, arms)
        if self._again:
            order = np.argsort(self._rng.random((runs, 1, rounds, arms)), axis=-1)
            x = np.take_along_axis(x, order, axis=-1)
            d = x[..., 2] - (x[..., 0] + x[..., 1]) / 2
            return d + self._planted, (x[..., 1] - x[..., 0]) * math.sqrt(1.5 / 2)
        flipped = (self._rng.random((runs, 1, 1)) < 0.5) ^ (np.arange(rounds) % 2 == 0)
        return np.where(flipped, -1, 1) * (x[..., 1] - x[..., 0]) + self._planted, None

    def _stored(self) -> Array:
        x = self._process(2 * STORED_PAIRS)
        return x[..., 1::2] - x[..., ::2]


def _group_weights() -> tuple[Array, Array]:
    """Return the weights of family means and of curves' tilts, (families, cases)."""
    size = CASES // FAMILIES
    x: Array = np.arange(size, dtype=np.float64) - (size - 1) / 2
    eye: Array = np.eye(FAMILIES, dtype=np.float64)
    tilt = x / float((x**2).sum()) * (size - 1)
    means: Array = np.kron(eye, np.full(size, 1 / size)).astype(np.float64)
    return means, np.kron(eye, tilt).astype(np.float64)


_MEANS, _TILTS = _group_weights()


def table(rows: Sequence[Figures]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| noise | A/A rounds | checks | with a false alarm | at most (95 %) | finds +5 % "
        "| finds +10 % | +1 % judged slower | cases suspected |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        found = row.found
        lines.append(
            f"| {row.noise} | {'same job' if row.again else 'stored'} | {row.runs} "
            f"| {row.alarm_rate:.2%} | {row.alarm_bound:.2%} | {found[0.05]:.1%} "
            f"| {found[0.10]:.1%} | {found[0.01]:.3%} | {row.suspects:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print or write the table."""
    runs = int(arguments[0]) if arguments else 1000
    rows = [
        figures(noise, Rule(), runs=runs, again=again) for noise in Noise for again in (False, True)
    ]
    if len(arguments) > 1:
        document = Path(arguments[1])
        text = document.read_text(encoding="utf-8")
        document.write_text(with_table(text, table(rows)), encoding="utf-8")
    else:
        print(table(rows))


def with_table(text: str, rows: str) -> str:
    """Return a document with the table between its marks; raises ValueError if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document lacks {BEGIN} or {END}")
    return f"{before}{begin}\n{rows}\n{end}{after}"


if __name__ == "__main__":
    main(sys.argv[1:])
