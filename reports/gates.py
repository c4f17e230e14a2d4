"""What repeated checks of equal code and planted slowdowns ended in, as Markdown tables.

The records are those of `published/experiments/cpu_gate.py` and `gpu_gate.py`. Imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mambench.harness.errors import RunFolderError
from mambench.reports.markdown import escape

_PLANTED = {
    "pass": "one more pass over SSD's input",
    "loop": "the selective scan's loop has one tile more in twenty",
    "tuning": "the selective scan's configuration is a worse one",
    "one": "the selective scan's loop has one tile more in a hundred",
    "wait": "attention is 1 % slower from 8,192 tokens on, by one launch more, which waits",
}
_HEAD = ("what", "checks", "with an alarm", "exit codes", "could see", "took")


def table(path: Path) -> str:
    """Return a record's table; a sentence if there is no record yet.

    Raises RunFolderError where the file is none.
    """
    if not path.exists():
        return "There is no record of this yet."
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return _gpu(record) if "parts" in record else _cpu(record)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunFolderError(f"{path}: not the record of a gate's series: {error!r}") from error


def _cpu(record: Mapping[str, Any]) -> str:
    checks: list[dict[str, Any]] = record["checks"]
    loads = [load for check in checks for load in check["load_average"]]
    series: list[list[int]] = record.get("series", [])
    beside = f" {len(series)} series side by side, each on {record['cores']} cores of its own."
    idle = max(loads) <= record["cores"]
    said = (
        f"{record['made_at'][:10]}, code {record['commit'][:8]}, a machine of "
        f"{record.get('machine_cores', record['cores'])} logical cores; {len(checks)} of "
        f"{record['asked']} checks, a promise of "
        f"{record['promise_percent']} %. Its load average was {min(loads):.1f} to {max(loads):.1f}"
        + ("." if idle or series else ": others worked on it meanwhile.")
        + (beside if series else "")
        + (f" {escape(record['note'])}" if record.get("note") else "")
    )
    planted: list[dict[str, Any]] | dict[str, Any] = record["planted"]
    found = planted if isinstance(planted, list) else [planted]
    named = sorted({name for check in found for name in check["regressed"]})
    rows = [_series("equal code", checks), _series("SSD computes everything twice", found)]
    return "\n".join(
        [said, "", *_markdown(rows), "", *(f"- REGRESSED: {escape(name)}" for name in named)]
    )


def _gpu(record: Mapping[str, Any]) -> str:
    parts: list[dict[str, Any]] = record["parts"]
    devices = sorted({line.partition(": ")[2].strip() for line in record["listed"]})
    said = f"{record['made_at'][:10]}, {', '.join(map(escape, devices))}, {_runs(record)}."
    told = [part for part in parts if "counts" in part]
    rows = [_series("equal code, 12 cases", [part for part in told if part["part"] == "aa"])]
    sixty = [part for part in told if part["part"] == "sixty"]
    rows += [_series("equal code, 60 cases", sixty)] if sixty else []
    named: list[str] = []
    for part in told:
        if part["part"] not in _PLANTED:
            continue
        what, cases = _PLANTED[part["part"]], part["planted_cases"]
        regressed = part["regressed"]
        right = "right" if part["named_right"] else "wrong"
        found = f"{len(regressed)} named, {right}" if regressed else "none"
        rows.append(
            (
                what,
                "1",
                found,
                str(part["exit_code"]),
                _frac(part["smallest_seen_frac"]),
                f"{part['took_s']:.0f} s",
            )
        )
        named += [
            f"- {what}: {case['verdict'].upper()} {escape(case['name'])} {case['change_frac']:+.1%}"
            for case in cases
            if case["change_frac"] is not None
        ]
        named += [
            f"- {what}: REGRESSED {escape(point['name'])} [{escape(point['metric'])}]"
            for point in regressed
            if point.get("metric", "time_s") != "time_s" and not _slower(cases)
        ]
    rates = [part["alarm_rate"] for part in told if part["part"] == "aa" and part["alarm_rate"]]
    return "\n".join([said, "", *_markdown(rows), "", *named, *_found(rates)])


def _runs(record: Mapping[str, Any]) -> str:
    """Return on how many GPUs, and how often, a record was made."""
    series: list[dict[str, Any]] = record.get("series", [])
    if not series:
        return f"{len(record['gpus'])} of them side by side, {record['took_s']:.0f} s in all"
    counts = [one["gpus"] for one in series]
    return f"{len(series)} runs, {min(counts)} to {max(counts)} of them side by side"


def _slower(cases: Sequence[Mapping[str, Any]]) -> bool:
    return any(case["verdict"] == "regressed" for case in cases)


def _found(rates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what simulated checks with the devices' own noise found."""
    if not rates:
        return []
    shares = [
        f"{min(rate['found'][change] for rate in rates):.1%} of +{float(change):.0%}"
        for change in rates[0]["found"]
    ]
    alarms, checks = (sum(rate[name] for rate in rates) for name in ("alarms", "simulated_checks"))
    return [
        "",
        f"Simulated with the devices' own A/A rounds: {alarms} of {checks} checks of equal code "
        f"raise an alarm, and at least {' and '.join(shares)} planted in one case are found.",
    ]


def _series(what: str, checks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    codes = [check["exit_code"] for check in checks]
    seen = sorted(check["smallest_seen_frac"] for check in checks if check["smallest_seen_frac"])
    could = f"{_frac(seen[0])} to {_frac(seen[-1])}" if seen else "nothing"
    took = [check["took_s"] for check in checks]
    return (
        what,
        str(len(checks)),
        str(sum(bool(check["regressed"]) for check in checks)),
        ", ".join(f"{codes.count(code)} x {code}" for code in sorted(set(codes))),
        could,
        f"{min(took):.0f} to {max(took):.0f} s, median {median(took):.0f}" if took else "-",
    )


def _frac(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head = [f"| {' | '.join(_HEAD)} |", f"|---|{'--:|' * (len(_HEAD) - 1)}"]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows)]
