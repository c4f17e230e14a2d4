"""What a selection holds whose cases have no times, as where only launches were asked for.

A row per case that ended ok, a column per metric that some case has; what is modelled is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mambench.harness.spec import METRICS, Metric
from mambench.reports import units
from mambench.reports.rows import Row, Slice


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The metrics that some case has, and the cases."""

    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]

    @property
    def headline(self) -> str:
        """Say what was measured."""
        names = [metric.name for metric in self.metrics]
        listed = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
        return f"No times here: what was measured is {listed}."

    def cells(self, row: Row) -> tuple[str, ...]:
        """Return a case's values with their units, in the order of the metrics."""
        return tuple(
            units.quantity(row.result.value(metric.tag), metric.unit) for metric in self.metrics
        )


def of(part: Slice) -> Recorded | None:
    """Return what was measured where nothing has a time; None where something has, or nothing."""
    rows = tuple(row for row in part.rows if row.found)
    if part.timed or not rows:
        return None
    metrics = tuple(m for m in METRICS if not m.modelled and _any(rows, m.tag))
    return Recorded(metrics=metrics, rows=rows)


def named(row: Row) -> str:
    """Return what a line of a table is called: the series, its length and its d_state."""
    sizes = [f"L = {units.count(row.seqlen)}"] if row.seqlen is not None else []
    sizes += [f"N = {row.d_state}"] if row.d_state is not None else []
    return row.label + (f" ({', '.join(sizes)})" if sizes else "")


def _any(rows: Sequence[Row], tag: str) -> bool:
    return any(row.result.value(tag) is not None for row in rows)
