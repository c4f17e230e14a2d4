"""The table of what kernels compile to."""

import json
from pathlib import Path

import pytest

from mambench.harness.errors import RunFolderError
from mambench.reports import compiled

PUBLISHED = Path(__file__).parents[2] / "published" / "experiments" / "compiled-kernels.json"


def kernel(entry: str, architecture: int, name: str, *figures: int, **more: str):
    named = dict(zip(("registers", "stack_bytes", "shared_bytes"), figures, strict=False))
    return {"entry": entry, "architecture": architecture, "kernel": name, **named, **more}


def written(path: Path, *kernels) -> Path:
    head = {"made_at": "2026-11-22T13:00:00+00:00", "commit": "0123456789ab", "triton": "3.6.0"}
    path.write_text(json.dumps(head | {"kernels": kernels}))
    return path


def test_a_cell_holds_the_most_of_a_kernels_forms(tmp_path: Path):
    path = written(
        tmp_path / "r.json",
        kernel("s6 triton bf16 N=16", 80, "scan", 40, 0, 1024),
        kernel("s6 triton fp32 N=16", 80, "scan", 30, 8, 512),
        kernel("s6 triton bf16 N=16", 90, "scan", 50, 0, 2560),
        kernel("conv bf16 time", 90, "conv", error="PassManager::run failed"),
    )
    rows = compiled.table(path).splitlines()[2:]
    assert rows[0] == "| operation | kernel | forms | sm_80 | sm_90 |"
    assert rows[2:] == [
        "| conv | `conv` | 1 | \u2013 | does not compile |",
        "| s6 triton | `scan` | 2 | 40, 8, 1 | 50, 0, 2.5 |",
    ]


@pytest.mark.parametrize("text", ["", "[]", '{"kernels": [{}]}'])
def test_another_file_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, match="not a record of compiled kernels"):
        compiled.table(path)


def test_every_published_kernel_compiles_and_hardly_spills():
    kernels = json.loads(PUBLISHED.read_text())["kernels"]
    assert not [k for k in kernels if "error" in k]
    assert {k["architecture"] for k in kernels} == {80, 90, 100, 120}
    assert max(k["stack_bytes"] for k in kernels) <= 256
