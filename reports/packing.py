"""How what a page embeds is made small; `assets/report.js` undoes it."""

import base64
import gzip
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from mambench.harness.analysis import QUANTILES, quantile
from mambench.reports.figures import Figure

# Digits of embedded numbers: finer than any measurement, and half the size.
SIGNIFICANT = 7
NOTED = 4  # of what only stands beside a measurement


def number(value: Any) -> Any:
    """Return a value with as many digits as are embedded; what JSON cannot hold is None."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}") if math.isfinite(value) else None
    return value


Nested = Mapping[str, Any]


def flat(records: Sequence[Iterable[tuple[str, Nested]]]) -> dict[str, list[Any]]:
    """Return each row's nested records as columns by dotted key; what is empty is None.

    Lists become one text each, numbers have `NOTED` digits.

    Args:
        records: by row, prefixes of keys and what is below them.
    """
    columns: dict[str, list[Any]] = {}
    for row, parts in enumerate(records):
        for prefix, nested in parts:
            _spread(nested, prefix, row, columns, len(records))
    return {key: _noted(values) for key, values in columns.items()}


def _spread(
    nested: Nested, prefix: str, row: int, columns: dict[str, list[Any]], count: int
) -> None:
    for name, value in nested.items():
        key = prefix + name
        if isinstance(value, dict):
            _spread(cast("Nested", value), f"{key}.", row, columns, count)
        elif value is not None and value != "" and value != []:
            if key not in columns:
                columns[key] = [None] * count
            columns[key][row] = (
                _text(cast("Sequence[Any]", value)) if isinstance(value, list) else value
            )


def _text(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _noted(values: list[Any]) -> list[Any]:
    """Return a column with rounded numbers, each distinct one rounded once."""
    short = {
        value: float(f"{value:.{NOTED}g}") if math.isfinite(value) else str(value)
        for value in {value for value in values if type(value) is float}
    }
    return [short[value] if type(value) is float else value for value in values]


def repeated(values: list[Any]) -> list[Any] | dict[str, list[Any]]:
    """Return a column with few distinct values as those and, per row, the number of its own."""
    # Equal values of different types, and lists and dicts, are told apart by how they print.
    kinds = set(map(type, values)) - {type(None)}
    alike = len(kinds) <= 1 and not kinds & {list, dict}
    keys = values if alike else list(map(repr, values))
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    if 4 * len(places) > len(values):
        return values
    at = [places[key] for key in keys]
    distinct = dict(zip(at, values, strict=True))
    return {"distinct": [distinct[place] for place in range(len(places))], "at": at}


def packed(rows: Sequence[int]) -> list[int]:
    """Return evenly spaced row numbers as the first, minus their count, and a step other than 1."""
    step = rows[1] - rows[0] if len(rows) > 2 else 0
    if step > 0 and list(rows) == list(range(rows[0], rows[0] + step * len(rows), step)):
        return [rows[0], -len(rows), *([step] if step > 1 else [])]
    return list(rows)


def beside_time(bound: float | None, time_s: float | None) -> int | None:
    """Return how far an interval's end lies from the time, in millionths of it: half the size."""
    return None if bound is None or not time_s else round((bound / time_s - 1) * 1e6)


def beside_medians(
    samples: Sequence[Sequence[float]], times_s: Sequence[float | None]
) -> list[list[Any] | None]:
    """Return how every row's samples spread, at `analysis.QUANTILES`.

    As the median (0: it is the row's time), and the others' distances from it in ten-thousandths;
    None where there is no sample.
    """
    found: list[list[Any] | None] = [None] * len(samples)
    by_count: dict[int, list[int]] = defaultdict(list)
    for row, taken in enumerate(samples):
        by_count[len(taken)].append(row)
    by_count.pop(0, None)
    for rows in by_count.values():
        ordered = np.sort([samples[row] for row in rows], axis=1).T
        quantiles = np.stack([quantile(ordered, at) for at in QUANTILES])
        middles = quantiles[len(QUANTILES) // 2].tolist()
        others = np.delete(quantiles, len(QUANTILES) // 2, axis=0)
        shares = np.rint((others / middles - 1) * 1e4).astype(int).T.tolist()
        for row, middle, own in zip(rows, middles, shares, strict=True):
            if middle:
                found[row] = [0 if middle == times_s[row] else number(middle), *own]
    return found


def short_id(case_id: str) -> str:
    """Return twelve hexadecimal digits as eight of base 64: nothing makes them smaller."""
    return base64.b64encode(bytes.fromhex(case_id)).decode()


def rounded(layout: Figure) -> Figure:
    """Return a layout whose logarithmic ranges have no more digits than a screen shows."""
    return {
        name: axis | {"range": [round(end, 4) for end in axis["range"]]}
        if "range" in axis
        else axis
        for name, axis in layout.items()
    }


def compressed(data: bytes) -> str:
    """Return gzip in base64; without a time stamp, so that equal runs give equal files."""
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
