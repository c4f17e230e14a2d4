"""What a check prints and writes: text, Markdown, JSON, JUnit XML, GitHub annotations.

Everything is made from one `CheckReport`. Imports neither torch nor triton.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from mambench.harness.check.conclusion import FAILURES, CheckReport
from mambench.harness.metrics import METRICS
from mambench.harness.text import binary_bytes, si_time, table
from mambench.harness.verdict import TIMES, Kind, Point, Verdict

VERSION = 1
MARKDOWN_LIMIT = 64_000  # characters; a comment or step summary of GitHub takes a little more
_UNITS = {m.tag: m.unit for m in METRICS}
_SIGNS = {
    Verdict.REGRESSED: "🔴",
    Verdict.FAILED: "❌",
    Verdict.MISSING: "❌",
    Verdict.UNSTABLE: "🟠",
    Verdict.INCONCLUSIVE: "⚪",
    Verdict.IMPROVED: "🟢",
    Verdict.NEW: "🆕",
    Verdict.SAME: "✅",
}


# --- how quantities are written ------------------------------------------------------------------


def quantity(value: float | None, metric: str) -> str:
    """Return a value with its unit."""
    if value is None:
        return "-"
    if metric.endswith("_bytes"):
        return binary_bytes(value)
    unit = _UNITS.get(metric, "1")
    if unit == "s":
        return si_time(value)
    return f"{value:,.6g}" if unit == "1" else f"{value:,.6g} {unit}"


def percent(value: float | None, *, sign: bool = True) -> str:
    """Return a fraction as a percentage."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:+.1%}" if sign else f"{value:.1%}"


def what(point: Point) -> str:
    """Return what a point is about: its name, and the metric where it is not the time."""
    kinds = {Kind.CASE: "", Kind.FAMILY: "family ", Kind.EXPONENT: "scaling of ", Kind.BUDGET: ""}
    metric = "" if point.metric == "time_s" else f" [{point.metric}]"
    return f"{kinds[point.kind]}{point.name}{metric}"


def because(point: Point) -> str:
    """Return the sentence beside a verdict."""
    parts = [
        part for part in (point.reason, point.accepted and f"accepted: {point.accepted}") if part
    ]
    return "; ".join(parts)


# --- formats -------------------------------------------------------------------------------------


def text(report: CheckReport, *, everything: bool = False) -> str:
    """Return what a terminal shows."""
    shown = [
        p for p in report.ordered() if everything or not (p.verdict is Verdict.SAME or p.tolerated)
    ]
    rows = [
        (
            _word(p).upper() if report.judged else "",
            what(p),
            quantity(p.base, p.metric),
            quantity(p.head, p.metric),
            percent(p.change_frac),
            f"{percent(p.low_frac)} .. {percent(p.high_frac)}" if p.low_frac is not None else "",
            percent(p.smallest_seen_frac, sign=False),
        )
        for p in shown
    ]
    lines = [f"{name}: {value}" for name, value in report.facts.items()]
    lines += [f"note: {note}" for note in report.assessment.notes]
    if rows:
        header = ("", "", "base", "head", "change", "90 % interval", "could see")
        lines += ["", table(rows, header=header, right="  rrrrr")]
    for point in shown:
        if point.verdict in (Verdict.SAME, Verdict.IMPROVED) or not report.judged:
            continue
        lines += ["", f"{_word(point).upper()} {what(point)}"]
        lines += [f"  {line}" for line in _explanation(point)]
    return "\n".join([*lines, "", *_closing(report)])


def _word(point: Point) -> str:
    """Return the verdict, and of a regression that is meant that it is."""
    return f"{point.verdict} (accepted)" if point.accepted else str(point.verdict)


def _closing(report: CheckReport) -> list[str]:
    if not report.judged or report.problem is not None:
        return [report.conclusion]
    return [*_sentences(report), report.conclusion]


def _sentences(report: CheckReport) -> Sequence[str]:
    """Return what is said of the check as a whole, before its conclusion."""
    return (report.seen, report.alarms) if report.closing is None else report.closing


def _explanation(point: Point) -> list[str]:
    lines = [because(point)] if because(point) else []
    lines += [f"changed too: {note}" for note in point.notes]
    return lines + ([f"reproduce: {point.command}"] if point.command else [])


def markdown(report: CheckReport) -> str:
    """Return a summary for a pull request, below 64 KB; what matters comes first."""
    sign = {0: "✅", 3: "⚠️"}.get(report.exit_code, "❌")
    lines = [f"## {sign} {report.title}", "", f"**{report.conclusion}**", ""]
    if report.judged and report.problem is None:
        lines += [*_sentences(report), ""]
    lines += [f"- {name}: {_escaped(value)}" for name, value in report.facts.items()]
    lines += [f"- note: {_escaped(note)}" for note in report.assessment.notes]
    head = [
        "",
        "| | what | base | head | change | 90 % interval | could have seen |",
        "|---|---|--:|--:|--:|:-:|--:|",
    ]
    ordered = report.ordered()
    rows = [_markdown_row(p, report.judged) for p in ordered]
    details = [
        block
        for p in ordered
        if p.verdict in (Verdict.REGRESSED, Verdict.FAILED, Verdict.MISSING, Verdict.UNSTABLE)
        for block in (_markdown_details(p),)
        if report.judged and not p.tolerated
    ]
    return _within("\n".join(lines), head, rows, details)


def _within(opening: str, head: Sequence[str], rows: list[str], details: list[str]) -> str:
    """Join the parts, leaving out rows and then details from the end until they fit."""
    room = MARKDOWN_LIMIT - _size(opening) - _size("\n".join(head)) - 400
    kept_details, room = _fitting(details, room)
    kept_rows, room = _fitting(rows, room)
    left = len(rows) - len(kept_rows)
    more = [f"\n{left} further points are in the JSON and JUnit files."] if left else []
    missing = len(details) - len(kept_details)
    more += [f"\n{missing} further explanations are in the JSON file."] if missing else []
    return "\n".join([opening, *(head if kept_rows else []), *kept_rows, *more, *kept_details, ""])


def _fitting(parts: list[str], room: int) -> tuple[list[str], int]:
    kept: list[str] = []
    for part in parts:
        if _size(part) + 1 > room:
            break
        kept.append(part)
        room -= _size(part) + 1
    return kept, room


def _size(text: str) -> int:
    return len(text.encode())


def _markdown_row(point: Point, judged: bool) -> str:
    interval = ""
    if point.low_frac is not None:
        interval = f"{percent(point.low_frac)} … {percent(point.high_frac)}"
    cells = (
        f"{'☑️' if point.accepted else _SIGNS[point.verdict]} {_word(point)}" if judged else "",
        _escaped(what(point)),
        quantity(point.base, point.metric),
        quantity(point.head, point.metric),
        percent(point.change_frac),
        interval,
        percent(point.smallest_seen_frac, sign=False),
    )
    return f"| {' | '.join(cells)} |"


def _markdown_details(point: Point) -> str:
    lines = [f"\n<details><summary>{_word(point)}: {_html(what(point))}</summary>\n"]
    lines += [f"- {_escaped(line)}" for line in ([because(point)] if because(point) else [])]
    lines += [f"- changed too: {_escaped(note)}" for note in point.notes]
    if point.command:
        lines += ["\n```sh", point.command.replace("```", "'''"), "```"]
    return "\n".join([*lines, "\n</details>"])


def _escaped(value: str) -> str:
    for sign in "\\|*_`<>[]":
        value = value.replace(sign, f"\\{sign}" if sign not in "<>" else f"&{'lg'[sign == '>']}t;")
    return value.replace("\n", " ")


def _html(value: str) -> str:
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_json(report: CheckReport) -> dict[str, Any]:
    """Return everything as plain JSON values; a missing number is null."""
    assessment = report.assessment
    return {
        "version": VERSION,
        "title": report.title,
        "conclusion": report.conclusion,
        "exit_code": report.exit_code,
        "problem": report.problem,
        "facts": dict(report.facts),
        "notes": list(assessment.notes),
        "judged": report.judged,
        "counts": {v.value: n for v, n in assessment.counts().items()} if report.judged else {},
        "smallest_seen_frac": assessment.smallest_seen_frac,
        "promise_frac": assessment.promise_frac,
        "blind": assessment.blind,
        "alarm_rate": report.alarm_rate,
        "wall_s": report.wall_s,
        "points": [
            _point_json(p) | ({} if report.judged else {"verdict": None}) for p in report.ordered()
        ],
    }


def _point_json(point: Point) -> dict[str, Any]:
    values = asdict(point) | {"key": point.key, "case": point.case and point.case.to_dict()}
    values["case_id"] = point.case.case_id if point.case else None
    return json.loads(json.dumps(values, default=str))


def junit(report: CheckReport) -> str:
    """Return JUnit XML with a test case per point; what fails the check fails there too."""
    points = report.ordered()
    failing = [p for p in points if _fails(p, report)]
    broken = [p for p in failing if FAILURES[p.verdict] != 1]
    suite = ElementTree.Element(
        "testsuite",
        name=report.title,
        tests=str(len(points) + 1),
        failures=str(len(failing) - len(broken)),
        errors=str(len(broken) + (report.exit_code != 0 and not failing)),
        time=f"{report.wall_s or 0:.3f}",
    )
    overall = ElementTree.SubElement(suite, "testcase", classname="check", name="conclusion")
    if report.exit_code != 0 and not failing:
        ElementTree.SubElement(overall, "error", message=_xml(report.conclusion))
    ElementTree.SubElement(overall, "system-out").text = _xml("\n".join(_closing(report)))
    for point in points:
        _junit_case(suite, point, report)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _junit_case(suite: ElementTree.Element, point: Point, report: CheckReport) -> None:
    kind = f"{point.kind}.{point.metric}"
    node = ElementTree.SubElement(suite, "testcase", classname=kind, name=_xml(what(point)))
    if point.head is not None and point.metric in TIMES:
        node.set("time", f"{point.head:.9f}")
    said = f"{point.verdict} {percent(point.change_frac)} {because(point)}".strip()
    if _fails(point, report):
        tag = "failure" if FAILURES[point.verdict] == 1 else "error"
        child = ElementTree.SubElement(node, tag, message=_xml(said))
        child.text = _xml("\n".join(_explanation(point)))
    elif point.verdict in (Verdict.NEW, Verdict.INCONCLUSIVE, Verdict.UNSTABLE, Verdict.MISSING):
        ElementTree.SubElement(node, "skipped", message=_xml(said))
    else:
        ElementTree.SubElement(node, "system-out").text = _xml(said)


def _fails(point: Point, report: CheckReport) -> bool:
    excused = point.accepted is not None or point.tolerated
    return report.judged and not excused and point.verdict in report.fail_on


def _xml(text: str) -> str:
    """Leave out what XML 1.0 cannot hold."""
    return "".join(
        c for c in text if c in "\t\n" or 0x20 <= ord(c) < 0xD800 or 0xE000 <= ord(c) < 0xFFFE
    )


def annotations(report: CheckReport) -> Iterable[str]:
    """Yield GitHub's workflow commands: an error or warning per point that is not as it was."""
    kinds = {
        Verdict.REGRESSED: "error",
        Verdict.FAILED: "error",
        Verdict.MISSING: "error",
        Verdict.UNSTABLE: "warning",
    }
    for point in report.ordered():
        if point.verdict not in kinds or point.tolerated or not report.judged:
            continue
        kind = kinds[point.verdict] if _fails(point, report) else "notice"
        said = [f"{what(point)}: {percent(point.change_frac)}", *_explanation(point)]
        yield f"::{kind} title={_property(_word(point).upper())}::{_command(chr(10).join(said))}"
    kind = "notice" if report.exit_code == 0 else "error"
    yield f"::{kind} title={_property(report.title)}::{_command(' '.join(_closing(report)))}"


def _command(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _command(value).replace(":", "%3A").replace(",", "%2C")
