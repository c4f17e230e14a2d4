"""`--filter`: which of a plan's cases to keep.

A filter is a comparison, `NAME OP VALUE` with OP one of `= != < <= > >=`, or else a piece of text
that must occur in the case's label (in any case of letters). NAME is an axis (`seqlen>=4096`; as in
labels also B, L, D, N), or `implementation`, `variant`, `family`, `level`, `pass` or `dtype`, for
which `=` and `!=` take globs (`variant=sdpa-*`). A case without the size that is compared is kept:
attention has no d_state and is the reference against every one. Of several filters all must hold.
"""

import fnmatch
import operator
import re
from collections.abc import Callable
from typing import Any

from mambench.harness.axes import AXES, parse_values
from mambench.harness.errors import UsageError, unknown_name
from mambench.harness.spec import Case, DType, Family, Level, Pass

Predicate = Callable[[Case], bool]

_COMPARISON = re.compile(r"\s*([A-Za-z_]+)\s*(==|!=|<=|>=|=|<|>)\s*(\S+)\s*")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CLOSED = {"family": Family, "level": Level, "pass": Pass, "dtype": DType}
# The letters of a case's label.
_LETTERS = {"B": "batch", "L": "seqlen", "D": "d_inner", "N": "d_state"}
NAMES = (*AXES, "implementation", "variant", *_CLOSED)


def compile_filter(text: str) -> Predicate:
    """Return the test that a filter stands for; raises UsageError if it cannot be read."""
    match = _COMPARISON.fullmatch(text)
    if match is None:
        wanted = text.strip().lower()
        if not wanted:
            raise UsageError(
                "an empty filter: write seqlen>=4096, variant=sdpa-* or part of a label."
            )
        return lambda case: wanted in case.label.lower()
    name, symbol, value = match.groups()
    name = _LETTERS.get(name, name)
    if name not in NAMES:
        raise UsageError(f"filter '{text}': {unknown_name('name', name, NAMES)}")
    if name in AXES:
        return _size_filter(name, symbol, value)
    return _name_filter(name, symbol, value)


def _size_filter(name: str, symbol: str, value: str) -> Predicate:
    bounds = parse_values(name, value)
    if len(bounds) > 1 and symbol not in ("=", "==", "!="):
        raise UsageError(f"filter '{name}{symbol}{value}': '{symbol}' compares with one value.")
    compare = _OPERATORS[symbol]

    def keep(case: Case) -> bool:
        size = getattr(case.problem, name)
        if size is None:
            return True
        if symbol == "!=":
            return size not in bounds
        return any(compare(size, bound) for bound in bounds)

    return keep


def _name_filter(name: str, symbol: str, value: str) -> Predicate:
    if symbol not in ("=", "==", "!="):
        raise UsageError(
            f"filter '{name}{symbol}{value}': {name} can only be compared with = and !=."
        )
    members = _CLOSED.get(name)
    if members is not None and not fnmatch.filter(members, value):
        raise UsageError(f"filter '{name}{symbol}{value}': {unknown_name(name, value, members)}")

    def keep(case: Case) -> bool:
        return fnmatch.fnmatchcase(case_field(case, name), value) is (symbol != "!=")

    return keep


def case_field(case: Case, name: str) -> str:
    """Return a case's implementation, variant, family, level, pass or dtype."""
    if name in ("family", "level"):
        return str(getattr(case.problem, name))
    return str(case.pass_ if name == "pass" else getattr(case, name))
