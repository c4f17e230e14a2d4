"""What a check said of a run, where its folder holds the file that `run_bench.py check` writes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from mambench.harness.analysis.runs import Run

FILE = "check.json"
_FIELDS: dict[str, Any] = dict.fromkeys(("verdict", "name", "metric", "change_frac", "reason"))


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A check as its file holds it; nothing is judged anew."""

    run_id: str
    conclusion: str
    points: tuple[dict[str, Any], ...]  # what matters first; those that are the same left out
    same: int


def load(runs: Sequence[Run]) -> tuple[Judged, ...]:
    """Return the checks beside the runs' records; a file that is none is left out."""
    found = [_read(run) for run in runs if run.path is not None]
    return tuple(judged for judged in found if judged is not None)


def _read(run: Run) -> Judged | None:
    assert run.path is not None
    try:
        values: Any = json.loads((run.path / FILE).read_text(encoding="utf-8"))
        points = [_FIELDS | cast("dict[str, Any]", dict(point)) for point in values["points"]]
        conclusion = str(values["conclusion"])
        said = [p for p in points if str(p["verdict"]) != "same"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Judged(
        run_id=run.run_id,
        conclusion=conclusion,
        points=tuple(said),
        same=len(points) - len(said),
    )
