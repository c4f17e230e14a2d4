"""The pytest plugin in a repository of a user, and the way to pytest-benchmark's JSON and back."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

from mambench.harness import pytest_benchmark_import
from mambench.harness.analysis import loading
from mambench.harness.errors import UsageError
from mambench.harness.pytest_plugin import Timer
from mambench.harness.spec import Device, DeviceKind
from mambench.reports import pytest_benchmark, render

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = f"""
import runpy

package = {str(ROOT / "mambench")!r}
from pathlib import Path
runpy.run_path(package + "/_start.py")["load_package"](Path(package))
pytest_plugins = ["mambench.harness.pytest_plugin"]
"""
SUITE = """
title: Small
settings: {threads: 1}
sweeps:
  - implementations: [associative_scan]
    families: [ssd]
    passes: [forward]
    dtype: fp32
    axes: {seqlen: [16, 32], d_inner: 32, d_state: 16, headdim: 16}
"""
TESTS = """
import pytest

def test_mine(bench_case):
    assert bench_case(sorted, [3, 1, 2]) == [1, 2, 3]

@pytest.mark.benchmark(min_rounds=7, group="named")
def test_marked(bench_case):
    assert bench_case(lambda: 4) == 4
    assert bench_case.benchmark.stats.stats.rounds >= 7

def test_ours(bench_case, mambench_case):
    bench_case(mambench_case)
"""
# Warnings are the user's to configure; a plugin of ours in the environment is not loaded twice.
OPTIONS = (
    *("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:mambench"),
    *("-p", "no:hypothesispytest"),  # seconds of imports
)


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, "--benchmark-max-time=0.02", *options],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """Return a user's repository after one run of its benchmarks, in `first.json`."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "test_speed.py").write_text(TESTS)
    done = run(folder, "--mambench-suite=suite.yaml", "--benchmark-json=first.json")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_functions_and_cases_are_timed_by_a_timer_that_waits(repository):
    found = json.loads((repository / "first.json").read_text())["benchmarks"]
    assert len(found) == 4
    assert {b["options"]["timer"] for b in found} == {"synchronised_perf_counter"}
    assert {b["group"] for b in found} == {None, "named"}
    ours = [b["extra_info"]["mambench"] for b in found if "mambench" in b["extra_info"]]
    assert sorted(b["case"]["problem"]["seqlen"] for b in ours) == [16, 32]


def test_the_timer_waits_for_a_gpu_before_it_reads_the_clock(monkeypatch):
    import torch

    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    timer = Timer()
    timer()
    timer.use(Device(kind=DeviceKind.CPU, name="a", memory_bytes=1))
    timer()
    assert waited == []
    timer.use(Device(kind=DeviceKind.CUDA, name="a", index=1, memory_bytes=1))
    first, second = timer(), timer()
    assert waited == ["cuda:1", "cuda:1"]
    assert second >= first


def test_the_cases_of_a_users_own_implementation(tmp_path):
    for name in ("bench_plugin.py", "fastmix.py", "gate.yaml"):
        shutil.copy(ROOT / "tests/gate_example" / name, tmp_path)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_speed.py").write_text(
        "def test_ours(bench_case, mambench_case):\n    bench_case(mambench_case)\n"
    )
    asked = ("--mambench-suite=gate.yaml", "--mambench-device=cpu", "--mambench-filter=seqlen=128")
    done = run(tmp_path, *asked, "--mambench-plugin=bench_plugin.py", "--benchmark-json=j.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "j.json").read_text())["benchmarks"]
    assert found["extra_info"]["mambench"]["case"]["implementation"] == "fastmix"


WRONG = (
    CONFTEST
    + """
import mambench.harness.gate as gate
from dataclasses import dataclass

@dataclass
class Report:
    passed: bool = False
    reason: str = "out is wrong"

gate.check = lambda *arguments, **named: Report()
"""
)


def test_a_wrong_answer_fails_and_has_no_time(repository, tmp_path):
    (tmp_path / "conftest.py").write_text(WRONG)
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "test_speed.py").write_text(TESTS)
    done = run(tmp_path, "--mambench-suite=suite.yaml", "--benchmark-json=j.json", "-k", "ours")
    assert done.returncode == 1
    assert "out is wrong" in done.stdout
    assert not (tmp_path / "j.json").exists()  # pytest-benchmark has nothing to write


def test_without_pytest_benchmark_it_says_what_to_install(repository):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, "-p", "no:benchmark", "-k", "test_mine"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip install pytest-benchmark" in done.stdout


def test_there_and_back_keeps_cases_and_samples(repository, tmp_path):
    path, count, left_out = pytest_benchmark_import.read(
        repository / "first.json", tmp_path / "run"
    )
    assert (count, left_out) == (2, 2)
    results = loading.load([path]).results
    exported = json.loads(render([path], "pytest-benchmark"))
    before = {
        b["extra_info"]["mambench"]["case_id"]: b["stats"]
        for b in json.loads((repository / "first.json").read_text())["benchmarks"]
        if b["extra_info"]
    }
    assert {r.case.case_id for r in results} == set(before)
    for benchmark in exported["benchmarks"]:
        stats = before[benchmark["extra_info"]["mambench"]["case_id"]]
        assert benchmark["stats"]["data"] == stats["data"]
        for name in ("min", "max", "mean", "median", "stddev", "rounds"):
            assert benchmark["stats"][name] == pytest.approx(stats[name], rel=1e-9)


def test_pytest_benchmark_compares_what_we_export(repository, tmp_path):
    path, _, _ = pytest_benchmark_import.read(repository / "first.json", tmp_path / "run")
    exported = json.loads(render([path], "pytest-benchmark"))
    (tmp_path / "one.json").write_text(json.dumps(exported))
    for benchmark in exported["benchmarks"]:
        benchmark["stats"] = pytest_benchmark.statistics_of(
            [2 * value for value in benchmark["stats"]["data"]]
        )
    (tmp_path / "two.json").write_text(json.dumps(exported))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest_benchmark", "compare"),
            *(str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--columns=median"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(2.00)" in done.stdout
    assert "(1.0)" in done.stdout


def test_the_suite_of_ours_can_be_named(repository, tmp_path):
    (tmp_path / "shim.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").touch()
    cases = ROOT / "harness" / "pytest_cases.py"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", *OPTIONS, "--collect-only", "-p", "shim"),
            *("--import-mode=importlib", "-c", "pytest.ini", str(cases)),
            f"--mambench-suite={repository / 'suite.yaml'}",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("test_case[") == 2, done.stdout + done.stderr


FAULTS = {
    "[": "not JSON",
    "{}": "no benchmarks",
    '{"benchmarks": [{"extra_info": {}}]}': "none of its 1 benchmarks",
}


@pytest.mark.parametrize("text", FAULTS)
def test_what_cannot_be_imported_is_refused(tmp_path, text):
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=FAULTS[text]):
        pytest_benchmark_import.read(path)
    with pytest.raises(UsageError, match="cannot be read"):
        pytest_benchmark_import.read(tmp_path / "none.json")


def test_statistics_are_those_of_the_standard_library():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    found = pytest_benchmark.statistics_of(values)
    assert found["median"] == 3.0
    assert found["stddev"] == statistics.stdev(values)
    assert found["iqr_outliers"] == 1
    assert found["hd15iqr"] == 4.0
    assert pytest_benchmark.statistics_of([2.0])["ops"] == 0.5
