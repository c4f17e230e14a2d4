"""The records of repeated checks, as documents show them."""

import json
from pathlib import Path

import pytest

from mambench.harness.errors import RunFolderError
from mambench.reports import gates


def check(**changes):
    told = {"exit_code": 0, "took_s": 61.0, "load_average": [1.0, 2.5], "regressed": []}
    return {**told, "smallest_seen_frac": 0.04, **changes}


def written(path: Path, record) -> Path:
    path.write_text(json.dumps(record))
    return path


def test_a_series_on_a_cpu(tmp_path: Path):
    record = {
        "made_at": "2030-01-31T00:00:00",
        "commit": "0123456789",
        "cores": 2,
        "asked": 3,
        "promise_percent": "10",
        "checks": [check(), check(exit_code=3, smallest_seen_frac=0.3), check(exit_code=3)],
        "planted": check(regressed=["ssd a_b"], exit_code=1),
    }
    text = gates.table(written(tmp_path / "r.json", record))
    assert "| equal code | 3 | 0 | 1 x 0, 2 x 3 | 4.0% to 30.0% | 61 to 61 s, median 61 |" in text
    assert "3 of 3 checks" in text
    assert "load average was 1.0 to 2.5: others worked on it meanwhile." in text
    quiet = {**record, "cores": 4, "note": "At another priority."}
    text = gates.table(written(tmp_path / "r.json", quiet))
    assert "1.0 to 2.5. At another priority." in text
    assert "REGRESSED: ssd a_b" in text
    assert "| SSD computes everything twice | 1 | 1 | 1 x 1 |" in text
    beside = {
        **record, "machine_cores": 64, "series": [[2, 2], [1, 2]],
        "planted": [record["planted"], check(regressed=["ssd c", "ssd a_b"], exit_code=1)],
    }  # fmt: skip
    text = gates.table(written(tmp_path / "r.json", beside))
    assert "a machine of 64 logical cores" in text
    assert "1.0 to 2.5. 2 series side by side, each on 2 cores of its own." in text
    assert "| SSD computes everything twice | 2 | 2 | 2 x 1 |" in text
    assert text.count("REGRESSED: ssd a_b") == text.count("REGRESSED: ssd c") == 1
    record["checks"][1]["regressed"] = ["flash"]
    text = gates.table(written(tmp_path / "r.json", record))
    assert "| equal code | 3 | 1 |" in text


def test_a_series_on_gpus(tmp_path: Path):
    rate = {"alarms": 1, "simulated_checks": 400, "found": {"0.05": 0.97}}
    point = {"name": "ssd:x", "verdict": "regressed", "change_frac": 0.12}
    more = {"counts": {"same": 12}, "alarm_rate": rate, "planted_cases": [], "named_right": None}
    parts = [
        {"part": "calibrate", "exit_code": 0},
        check(part="aa", **more),
        check(part="sixty", **{**more, "took_s": 200.0}),
        check(part="pass", **{**more, "planted_cases": [point], "regressed": [point],
                              "named_right": True, "exit_code": 1}),
        {"part": "loop", "problem": "it broke"},
    ]  # fmt: skip
    record = {"made_at": "2030-01-31", "took_s": 480.0, "gpus": ["0"], "listed": ["GPU 0: H100"]}
    text = gates.table(written(tmp_path / "r.json", {**record, "parts": parts}))
    assert "| equal code, 12 cases | 1 | 0 | 1 x 0 |" in text
    assert "200 to 200 s" in text
    assert "| one more pass over SSD's input | 1 | 1 named, right | 1 |" in text
    assert "REGRESSED ssd:x +12.0%" in text
    assert "1 of 400 checks of equal code" in text
    assert "at least 97.0% of +5%" in text
    assert "1 of them side by side, 480 s in all" in text
    joined = {**record, "parts": parts, "series": [{"gpus": 2}, {"gpus": 1}]}
    assert "2 runs, 1 to 2 of them side by side." in gates.table(written(tmp_path / "r", joined))


def test_what_is_no_record(tmp_path: Path):
    assert gates.table(tmp_path / "nothing.json") == "There is no record of this yet."
    for wrong in ("{", "{}", '{"parts": [1]}'):
        path = tmp_path / "r.json"
        path.write_text(wrong)
        with pytest.raises(RunFolderError, match="not the record"):
            gates.table(path)
