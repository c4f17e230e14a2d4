"""How quantities are written, the same everywhere: three significant digits and a unit.

Times, rates and counts take decimal prefixes (ms, GB/s, TFLOP/s), as datasheets do. Amounts of
memory take binary ones (MiB, GiB), as drivers and allocators do. `assets/report.js` has the same
rules for what the browser formats; a test compares the two.
"""

import math
from decimal import ROUND_HALF_UP, Context

MISSING = "\u2013"  # en dash
TIMES = "\u00d7"  # multiplication sign
_SI = {
    -12: "p",
    -9: "n",
    -6: "µ",
    -3: "m",
    0: "",
    3: "k",
    6: "M",
    9: "G",
    12: "T",
    15: "P",
    18: "E",
}
_SUFFIXES = {"_hz": "Hz", "_s": "s", "_w": "W", "_j": "J", "_c": "°C"}
_ROUND = Context(prec=3, rounding=ROUND_HALF_UP)
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def digits(value: float) -> str:
    """Return a number with three significant digits and no exponent."""
    if value == 0:
        return "0"
    rounded = _three_digits(value)
    places = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{places}f}"


def si(value: float | None, unit: str) -> str:
    """Return a value with a decimal prefix, such as `1.25 ms`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return f"0 {unit}".strip()
    rounded = _three_digits(value)  # first: 999.9 becomes 1000, which belongs to the next prefix
    exponent = 3 * math.floor(math.log10(abs(rounded)) / 3 + 1e-12)
    exponent = min(max(exponent, min(_SI)), max(_SI))
    return f"{digits(rounded / 10.0**exponent)} {_SI[exponent]}{unit}".strip()


def tick(text: str) -> str:
    """Return a written quantity without trailing zeros, for axes: `10 ms`."""
    if text.endswith(TIMES):
        return tick(text.removesuffix(TIMES)) + TIMES
    number, space, unit = text.partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


def seconds(value: float | None) -> str:
    """Return a time."""
    return si(value, "s")


def memory(value: float | None) -> str:
    """Return an amount of memory with a binary prefix, such as `1.25 GiB`."""
    if value is None or not math.isfinite(value):
        return MISSING
    power = 0
    while abs(value) >= 1023.5 and power < len(_BINARY) - 1:
        value /= 1024
        power += 1
    text = str(round(value)) if power == 0 else digits(value)
    return f"{text} {_BINARY[power]}"


def count(value: float | None) -> str:
    """Return a whole number with thousands separated, such as `131,072`."""
    return MISSING if value is None else f"{round(value):,}"


def about(value: float) -> str:
    """Return a length that was interpolated, with three significant digits: `1,850`."""
    return f"{round(_three_digits(value)):,}"


def ratio(value: float | None) -> str:
    """Return a factor, such as 2.41 times."""
    if value is None:
        return MISSING
    return f"{about(value) if value >= 999.5 else digits(value)}{TIMES}"


def quantity(value: float | None, unit: str) -> str:
    """Return a metric's value as its unit is written; a whole number of unit 1 is a count."""
    if value is None or unit == "bytes":
        return memory(value)
    if unit == "1":
        return count(value) if value == round(value) else digits(value)
    return si(value, unit.replace("tokens", "tok"))


def entry(key: str, text: str) -> str:
    """Return a manifest's or telemetry's number with the unit that its dotted key names."""
    try:
        value = float(text)
    except ValueError:
        return text
    for part in reversed(key.split(".")):
        if part.endswith("_bytes"):
            return memory(value)
        for suffix, unit in _SUFFIXES.items():
            if part.endswith(suffix):
                return si(value, unit)
    return text


def length(value: int | None) -> str:
    """Return a sequence length for an axis: `512`, `1K` (1,024), `128K`, `1M` (1,048,576)."""
    if value is None:
        return MISSING
    for factor, suffix in ((1024**2, "M"), (1024, "K")):
        if value >= factor and value % factor == 0:
            return f"{value // factor}{suffix}"
    return f"{value:,}"


def _three_digits(value: float) -> float:
    """Round the number's exact binary value, ties away from zero, as JavaScript's toPrecision."""
    return float(_ROUND.create_decimal_from_float(value))
