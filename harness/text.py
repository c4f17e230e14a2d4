"""How quantities and tables are written on a terminal. Imports nothing heavy."""

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """Return a wall time for a person: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def si_time(seconds: float) -> str:
    """Return a measured time to four digits with its unit: 71.23 us, 1.235 ms, 12.30 s."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.4g} {unit}"
    return f"{seconds * 1e9:.4g} ns"


def binary_bytes(count: float) -> str:
    """Return a number of bytes: 512 B, 1.5 KiB, 79.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), right: str = "") -> str:
    """Return aligned columns; `right` has an `r` at each column that is aligned to the right."""
    everything = [*([header] if header else []), *rows]
    if not everything:
        return ""
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    aligned = right.ljust(len(widths))
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, aligned, strict=True)
        ).rstrip()
        for row in everything
    )
