"""Makes observations of the rounds of a check out of thin air."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mambench.harness.check.judge import Evidence, Stages
from mambench.harness.check.rounds import Rounds
from mambench.harness.records import Observation
from mambench.harness.spec import Case, DType, Family, Outcome, Pass, Problem

NOISE = 0.004
LENGTHS = (256, 512, 1024, 2048)


def case(name: str = "scan", seqlen: int = 256, pass_: Pass = Pass.FORWARD) -> Case:
    problem = Problem(family=Family.ATTENTION, batch=1, seqlen=seqlen, d_inner=64, headdim=32)
    return Case(
        implementation=name, variant="torch", problem=problem, pass_=pass_, dtype=DType.FP32
    )


CASES = tuple(case(name, seqlen) for name in ("a", "b", "c") for seqlen in LENGTHS)


def observation(
    asked: Case,
    values: Mapping[str, Any],
    *,
    measurement: str = "time",
    round: int = 1,
    outcome: Outcome = Outcome.OK,
    reason: str | None = None,
    method: str | None = "perf_counter",
    details: Mapping[str, Any] | None = None,
) -> Observation:
    return Observation(
        case=asked,
        measurement=measurement,
        round=round,
        outcome=outcome,
        reason=reason,
        observation_id=f"{asked.case_id}{measurement}{round}",
        started_at="2026-01-01T00:00:00+00:00",
        duration_s=0.1,
        method=method,
        values=values if outcome is Outcome.OK else {},
        details=details or {},
    )


def side(
    rounds: Iterable[int],
    *,
    cases: Iterable[Case] = CASES,
    factor: Callable[[Case], float] = lambda _: 1.0,
    seed: int = 0,
    noise: float = NOISE,
) -> list[Observation]:
    """Return round 0 with the memory, and times of the other rounds."""
    rng = np.random.default_rng(seed)
    found = [
        observation(c, {"peak_memory_bytes": 2**20 * 64}, measurement="memory", round=0)
        for c in cases
    ]
    for round in rounds:
        for c in cases:
            time_s = 1e-6 * c.problem.tokens * factor(c) * math.exp(rng.normal(0, noise))
            found.append(observation(c, {"time_s": time_s}, round=round))
    return found


def evidence(
    base: list[Observation], head: list[Observation], *, confirmed: int = 2, **more: Any
) -> Evidence:
    """Return evidence of five rounds and so many confirmations of eight."""
    stages = [tuple(range(6 + 8 * k, 14 + 8 * k)) for k in range(confirmed)]
    return Evidence(
        base=Rounds.of(base),
        head=Rounds.of(head),
        stages=Stages(screening=tuple(range(1, 6)), confirmations=tuple(stages)),
        **more,
    )


ALL = range(1, 22)
