"""Whole blocks side by side: speeds and sizes where they belong, a leader only if it is clear."""

import pytest

from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.analysis.runs import Source
from mambench.harness.errors import RunFolderError
from mambench.harness.spec import Case, DeviceKind, DType, Family, Level, Outcome, Pass, Problem
from mambench.reports import blocks
from mambench.reports.units import MISSING

NAMES = {
    Family.ATTENTION: "flash_attention",
    Family.S6: "selective_scan",
    Family.SSD: "ssd",
}


def result(family, time_s, memory_bytes, *, batch=1, seqlen=1024, level=Level.BLOCK, **fields):
    problem = Problem(
        family=family,
        level=level,
        batch=batch,
        seqlen=seqlen,
        d_inner=2048,
        d_model=1024 if level is Level.BLOCK else None,
        d_state=None if family is Family.ATTENTION else 16,
        headdim=None if family is Family.S6 else 64,
    )
    case = Case(
        implementation=fields.pop("implementation", NAMES[family]),
        variant="hopper",
        problem=problem,
        pass_=fields.pop("pass_", Pass.TRAINING),
        dtype=DType.BF16,
    )
    values = {"source": "a", "run_id": "r", "outcome": Outcome.OK} | fields
    return Result(case=case, time_s=time_s, peak_memory_bytes=memory_bytes, **values)


def table(*results, **words):
    source = Source(key="a", label="a GPU", kind=DeviceKind.CUDA, device_name="a GPU", runs=())
    return blocks.table(Analysis(sources=(source,), results=results), **words)


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line[2:3].isdigit()]


def test_speed_and_memory_stand_by_batch_and_length():
    text = table(
        result(Family.SSD, 1e-3, 3 << 20, weight_count=12_600_000),
        result(Family.ATTENTION, 2e-3, 5 << 20),
        result(Family.S6, 4e-3, 4 << 20),
        result(Family.SSD, 4e-3, 9 << 20, batch=2, seqlen=2048),
        result(Family.ATTENTION, 1e-3, 8 << 20, batch=2, seqlen=2048),
    )
    assert "ssd:hopper, N = 16, 12.6 M weights" in text
    assert "training, bf16, d_model 1,024" in text
    head = next(line for line in text.splitlines() if line.startswith("| B"))
    assert head.split(" | ")[2:5] == [
        "transformer, tokens/s",
        "Mamba, tokens/s",
        "Mamba-2, tokens/s",
    ]
    assert rows(text) == [
        "| 1 | 1,024 | 512 k | 256 k | **1.02 M** | 5.00 MiB | 4.00 MiB | **3.00 MiB** |",
        f"| 2 | 2,048 | **4.10 M** | {MISSING} | 1.02 M | **8.00 MiB** | {MISSING} | 9.00 MiB |",
    ]


def test_a_lead_that_two_processes_may_differ_by_is_none():
    text = table(result(Family.SSD, 1e-3, 1 << 20), result(Family.S6, 1.01e-3, 2 << 20))
    assert rows(text) == ["| 1 | 1,024 | 1.01 M | 1.02 M | 2.00 MiB | **1.00 MiB** |"]


def test_what_did_not_end_well_says_how():
    text = table(
        result(Family.SSD, 1e-3, 1 << 20),
        result(Family.S6, None, None, outcome=Outcome.OOM),
    )
    assert rows(text) == ["| 1 | 1,024 | oom | 1.02 M | oom | 1.00 MiB |"]


def test_two_mixers_of_one_family_are_told_apart():
    text = table(
        result(Family.SSD, 1e-3, 1 << 20),
        result(Family.SSD, 2e-3, 1 << 20, implementation="mamba_ssm_ssd"),
    )
    assert "| Mamba-2 mamba_ssm_ssd:hopper, tokens/s | Mamba-2 ssd:hopper, tokens/s |" in text


def test_passes_have_tables_of_their_own_and_can_be_chosen():
    results = (
        result(Family.SSD, 1e-3, 1 << 20),
        result(Family.SSD, 2e-3, 1 << 20, pass_=Pass.FORWARD),
        result(Family.SSD, 3e-3, 1 << 20, level=Level.OP),
    )
    assert len(rows(table(*results))) == 2
    assert rows(table(*results, pass_="forward")) == ["| 1 | 1,024 | 512 k | 1.00 MiB |"]
    with pytest.raises(RunFolderError, match="no decode at block level"):
        table(*results, pass_="decode")
    with pytest.raises(RunFolderError, match="no case at block level"):
        table(results[-1])
