"""How what a page embeds is made small; `assets/report.js` undoes it."""

import base64
import math
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from mambench.harness.analysis.intervals import quantile
from mambench.harness.analysis.results import QUANTILES
from mambench.reports.figures import Figure

LEVEL = 6  # of compression: a higher one saves a hundredth and takes longer
# What a gzip stream begins with, and its end: checksum and length (RFC 1952).
_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_CHECK = struct.Struct("<II")
# Digits of embedded numbers: finer than any measurement, and half the size.
SIGNIFICANT = 7
NOTED = 4  # of what only stands beside a measurement


def numbers(values: list[Any]) -> list[Any]:
    """Return a column whose floats have the embedded digits; what JSON cannot hold is None."""
    places, floats = _floats(values)
    short = significant(floats, SIGNIFICANT)
    return _placed(values, places, [value if math.isfinite(value) else None for value in short])


def significant(values: Sequence[float], digits: int) -> list[float]:
    """Return numbers rounded to significant digits, as by writing and reading them."""
    found = np.asarray(values)
    with np.errstate(all="ignore"):
        places = digits - 1 - np.floor(np.log10(np.abs(found)))
        # A power of ten is exact up to the 22nd, and so is what is divided by it: the quotient is
        # the number that is nearest to the decimal one.
        scales = 10.0 ** np.abs(places)
        up = places >= 0
        whole = np.rint(np.where(up, found * scales, found / scales))
        rounded = np.where(up, whole / scales, whole * scales)
    exact = np.abs(places) <= 22
    made: list[float] = rounded.tolist()
    for index in np.flatnonzero(~exact).tolist():
        made[index] = float(f"{values[index]:.{digits}g}")
    return made


def _floats(values: Sequence[Any]) -> tuple[list[int], list[float]]:
    """Return the floats of a column and where they are."""
    places = [place for place, value in enumerate(values) if type(value) is float]
    return places, [values[place] for place in places]


def _placed(values: list[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    """Return a column with others in some places."""
    if len(places) == len(values):
        return list(others)
    found = list(values)
    for place, other in zip(places, others, strict=True):
        found[place] = other
    return found


Nested = Mapping[str, Any]


def flat(records: Sequence[Iterable[tuple[str, Nested]]]) -> dict[str, list[Any]]:
    """Return each row's nested records as columns by dotted key; what is empty is None.

    Lists become one text each, numbers have `NOTED` digits.

    Args:
        records: by row, prefixes of keys and what is below them.
    """
    below: dict[str, _Places] = defaultdict(_Places)  # by prefix
    filled: dict[str, tuple[list[int], list[Any]]] = {}  # rows and values by key, as first seen
    for row, parts in enumerate(records):
        for prefix, nested in parts:
            _spread(nested, prefix, row, below[prefix], filled)
    return {key: _noted(*column, len(records)) for key, column in filled.items()}


class _Places:
    """Where what is below a prefix goes: records are alike, and a key is put together once."""

    def __init__(self) -> None:
        self.columns: dict[str, tuple[list[int], list[Any]]] = {}
        self.further: dict[str, _Places] = {}


def _spread(
    nested: Nested,
    prefix: str,
    row: int,
    places: _Places,
    filled: dict[str, tuple[list[int], list[Any]]],
) -> None:
    for name, value in nested.items():
        if isinstance(value, dict):
            if name not in places.further:
                places.further[name] = _Places()
            _spread(cast("Nested", value), f"{prefix}{name}.", row, places.further[name], filled)
        elif value is not None and value != "" and value != []:
            column = places.columns.get(name)
            if column is None:
                column = places.columns[name] = filled.setdefault(prefix + name, ([], []))
            column[0].append(row)
            column[1].append(_text(value) if isinstance(value, list) else value)


def _text(values: Any) -> str:
    return ", ".join(map(str, values))


def _noted(rows: Sequence[int], values: list[Any], count: int) -> list[Any]:
    """Return a column with rounded numbers; rows that have no value have None."""
    places, floats = _floats(values)
    short = significant(floats, NOTED)
    kept = [value if math.isfinite(value) else str(value) for value in short]
    found: list[Any] = [None] * count
    for row, value in zip(rows, _placed(values, places, kept), strict=True):
        found[row] = value
    return found


def repeated(values: list[Any]) -> list[Any] | dict[str, list[Any]]:
    """Return a column with few distinct values as those and, per row, the number of its own."""
    # Equal values of different types, and lists and dicts, are told apart by how they print.
    kinds = set(map(type, values)) - {type(None)}
    alike = len(kinds) <= 1 and not kinds & {list, dict}
    keys = values if alike else list(map(repr, values))
    told = dict.fromkeys(keys)
    if 4 * len(told) > len(values):
        return values
    places = {key: place for place, key in enumerate(told)}
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
    """Return how every row's samples spread, at `results.QUANTILES`.

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
        short = numbers(middles)
        for row, middle, written, own in zip(rows, middles, short, shares, strict=True):
            if middle:
                found[row] = [0 if middle == times_s[row] else written, *own]
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


def begun(data: bytes) -> bytes:
    """Return data as the first part of a gzip stream, for `ended`: made apart from the second."""
    deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    made = deflate.compress(data) + deflate.flush(zlib.Z_FULL_FLUSH)
    return _CHECK.pack(zlib.crc32(data), len(data)) + made


def ended(first: bytes, data: bytes) -> str:
    """Return gzip in base64 of what `begun` made and of the data that follows.

    Without a time stamp, so that equal runs give equal files.
    """
    check, length = _CHECK.unpack_from(first)
    deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    last = deflate.compress(data) + deflate.flush()
    end = _CHECK.pack(zlib.crc32(data, check), length + len(data))
    return base64.b64encode(_GZIP_HEADER + first[_CHECK.size :] + last + end).decode()
