"""What an axis is called and how its values are written.

`512`, `1,2,4`, `2^9..2^17` (powers of two), `512..131072:x2` (doubling), `16..256:+16`. A suite
file and the command line's `--axis NAME=VALUES` share this notation.
"""

import re
from collections.abc import Mapping, Sequence
from typing import cast

from mambench.harness.errors import UsageError, unknown_name

AxisValue = int | bool | str

AXES: Mapping[str, str] = {
    "batch": "sequences computed at once",
    "seqlen": "tokens per sequence",
    "d_inner": "mixer width: channels, or heads times headdim (level op)",
    "d_model": "width of the residual stream (level block; the mixer's width follows)",
    "d_state": "state per channel (families s6 and ssd)",
    "headdim": "width of a head (families ssd and attention)",
    "ngroups": "groups that share B and C (families s6 and ssd)",
    "gated": "whether the output is multiplied by silu(z) (families s6 and ssd, level op)",
}

MAX_VALUES = 10_000  # a range of more values than this is a slip, not a question

_POWER = re.compile(r"(\d+)\^(\d+)")
_NUMBER = re.compile(r"\d+")
_RANGE = re.compile(r"(?P<low>[^.:]+)\.\.(?P<high>[^.:]+)(?::(?P<step>[x+]\d+))?")
_NOTATION = "write 512, 1,2,4, 2^9..2^17 (powers of two), 512..131072:x2 or 16..256:+16"


class AxisError(UsageError):
    """An axis has no such name or value; the message says what is allowed."""


def parse_axis(text: str) -> tuple[str, tuple[AxisValue, ...]]:
    """Split `NAME=VALUES`, as `--axis` takes it, into the axis and its values.

    Raises AxisError for an unknown axis or values that cannot be read.
    """
    name, equals, values = text.partition("=")
    name = name.strip()
    if not equals:
        raise AxisError(f"axis '{text}' has no values: write NAME=VALUES, as in seqlen=2^9..2^17.")
    if name not in AXES:
        raise AxisError(unknown_name("axis", name, AXES))
    return name, parse_values(name, values)


def parse_values(name: str, value: object) -> tuple[AxisValue, ...]:
    """Return an axis' values without repetition, in the order written.

    Args:
        name: the axis, one of AXES.
        value: a size, a boolean (for `gated`), a string in the notation above, or a list of these.

    Raises AxisError with what was got and what is allowed.
    """
    items = cast("Sequence[object]", value) if isinstance(value, list | tuple) else [value]
    parse = _booleans if name == "gated" else _sizes
    values = [parsed for item in items for parsed in parse(name, item)]
    if not values:
        raise AxisError(f"axis {name}: no values.")
    return tuple(dict.fromkeys(values))


def _booleans(name: str, item: object) -> list[bool]:
    if isinstance(item, bool):
        return [item]
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    parts = [part.strip().lower() for part in str(item).split(",")]
    unknown = [part for part in parts if part not in words]
    if unknown:
        raise AxisError(f"axis {name}: '{unknown[0]}' is not one of true, false.")
    return [words[part] for part in parts]


def _sizes(name: str, item: object) -> list[int]:
    if isinstance(item, bool) or not isinstance(item, int | str):
        raise AxisError(
            f"axis {name}: got {item!r}, expected a whole number or a range; {_NOTATION}."
        )
    if isinstance(item, int):
        return [_positive(name, item)]
    return [value for part in item.split(",") for value in _expand(name, part.strip())]


def _expand(name: str, part: str) -> list[int]:
    if ".." not in part:
        return [_size(name, part)]
    match = _RANGE.fullmatch(part.replace(" ", ""))
    if match is None:
        raise AxisError(f"axis {name}: cannot read '{part}'; {_NOTATION}.")
    low, high = _size(name, match["low"]), _size(name, match["high"])
    if high < low:
        raise AxisError(f"axis {name}: the range '{part}' runs backwards ({low} to {high}).")
    return _range(name, part, low, high, match["step"] or _default_step(name, part, match))


def _default_step(name: str, part: str, match: re.Match[str]) -> str:
    if _POWER.fullmatch(match["low"]) and _POWER.fullmatch(match["high"]):
        return "x" + match["low"].partition("^")[0]
    low, high = match["low"], match["high"]
    raise AxisError(
        f"axis {name}: the range '{part}' needs a step: {low}..{high}:x2 doubles, "
        f"{low}..{high}:+{low} adds {low}."
    )


def _range(name: str, part: str, low: int, high: int, step: str) -> list[int]:
    amount = int(step[1:])
    if amount < (2 if step[0] == "x" else 1):
        raise AxisError(f"axis {name}: the range '{part}' has a step that never arrives.")
    values = [low]
    while (after := values[-1] * amount if step[0] == "x" else values[-1] + amount) <= high:
        values.append(after)
        if len(values) > MAX_VALUES:
            raise AxisError(f"axis {name}: the range '{part}' has over {MAX_VALUES} values.")
    if values[-1] != high:
        raise AxisError(
            f"axis {name}: the range '{part}' never reaches {high}; write its last value, "
            f"{values[-1]}, as its end."
        )
    return values


def _size(name: str, text: str) -> int:
    if power := _POWER.fullmatch(text):
        if int(power[2]) > 62:
            raise AxisError(f"axis {name}: {text} is too large.")
        return _positive(name, int(power[1]) ** int(power[2]))
    if _NUMBER.fullmatch(text):
        return _positive(name, int(text))
    raise AxisError(f"axis {name}: '{text}' is not a whole number; {_NOTATION}.")


def _positive(name: str, value: int) -> int:
    if not 1 <= value < 2**62:
        raise AxisError(f"axis {name}: {value} is not a size (1 or more).")
    return value
