"""How what a page embeds is made small; `assets/report.js` undoes it."""

import base64
import gzip
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mambench.reports.figures import Figure

# Digits of embedded numbers: finer than any measurement, and half the size.
SIGNIFICANT = 7
NOTED = 4  # of what only stands beside a measurement


def number(value: Any) -> Any:
    """Return a value with as many digits as are embedded; what JSON cannot hold is None."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}") if math.isfinite(value) else None
    return value


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested records as dotted keys, lists as one text each, without what is empty."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            found |= flat(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        elif isinstance(value, float):
            found[prefix + name] = (
                float(f"{value:.{NOTED}g}") if math.isfinite(value) else str(value)
            )
        elif isinstance(value, list):
            if value:
                found[prefix + name] = ", ".join(map(str, cast("Sequence[Any]", value)))
        elif value is not None and value != "":
            found[prefix + name] = value
    return found


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


def beside_median(quantiles: Sequence[float] | None, time_s: float | None) -> list[Any] | None:
    """Return the median (0: it is the time), and the others' distances in ten-thousandths."""
    if quantiles is None or not (middle := quantiles[len(quantiles) // 2]):
        return None
    shares = [round((value / middle - 1) * 1e4) for value in quantiles]
    del shares[len(quantiles) // 2]
    return [0 if middle == time_s else number(middle), *shares]


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
