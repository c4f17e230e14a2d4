"""Cases that are judged together: families, and curves over the length. Imports no torch."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mambench.harness.check.moderated import Array, Mask
from mambench.harness.spec import Case
from mambench.harness.verdict import Kind

MIN_FAMILY = 4  # cases; fewer say no more than they say themselves
MIN_LENGTHS = 3


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cases, and the weights of their logarithms."""

    name: str
    members: Sequence[int]
    weights: Array
    lengths: Array  # log L of each member; of a curve only


def groups(kind: Kind, cases: Sequence[Case], complete: Mask) -> list[Group]:
    """Return the families or the curves over L, of cases that every screening round has."""
    whole = [i for i, there in enumerate(complete.tolist()) if there]
    if kind is Kind.FAMILY:
        return [
            Group(
                name=name,
                members=members,
                weights=np.full(len(members), 1 / len(members)),
                lengths=np.empty(0),
            )
            for name, members in _gathered({i: _family(cases[i]) for i in whole})
            if len(members) >= MIN_FAMILY
        ]
    # A pass that does not depend on the length has no curve.
    lengths = {i: cases[i].problem.seqlen for i in whole}
    logs = {i: float(np.log(length)) for i, length in lengths.items() if length is not None}
    curves: list[Group] = []
    for name, members in _gathered({i: _curve(cases[i]) for i in logs}):
        x = np.array([logs[i] for i in members])
        if len(np.unique(x)) >= MIN_LENGTHS:
            curves.append(Group(name=name, members=members, weights=_tilt(x), lengths=x))
    return curves


def change_where_longest(curves: Sequence[Group], change: Array) -> Array:
    """Return the mean change of each curve over the longest third of its lengths.

    Args:
        curves: what `groups` gave.
        change: of each case, as a difference of logarithms, (cases,).
    """
    found: list[float] = []
    for curve in curves:
        kept = max(1, len(curve.members) // 3)
        longest = np.argsort(curve.lengths)[-kept:]
        found.append(float(change[np.array(curve.members)[longest]].mean()))
    return np.array(found)


def _gathered(names: dict[int, str]) -> list[tuple[str, list[int]]]:
    found: dict[str, list[int]] = defaultdict(list)
    for i, name in names.items():
        found[name].append(i)
    return list(found.items())


def _family(case: Case) -> str:
    return f"{case.implementation} {case.pass_} {case.dtype}"


def _curve(case: Case) -> str:
    return " ".join(word for word in case.label.split() if not word.startswith("L=")) + " over L"


def _tilt(lengths: Array) -> Array:
    """Return weights that give the change of slope, as the change over the whole range of lengths.

    The slope of log time over log L is a weighted sum of log times (least squares); times the
    logarithm of the longest over the shortest it says how much the ends moved against each other.
    """
    apart = lengths - lengths.mean()
    return apart / float((apart**2).sum()) * float(np.ptp(lengths))
