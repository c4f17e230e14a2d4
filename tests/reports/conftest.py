"""Fixture runs: synthetic results of the right shape and size. No number here was ever measured."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mambench.harness.analysis import loading
from mambench.harness.records import Observation
from mambench.harness.spec import Case, DType, Family, Level, Outcome, Pass, Problem
from mambench.harness.store import RunFolder
from mambench.reports import rows
from mambench.reports.rows import Report

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned=1'> & \"q\""
GPU = {
    "kind": "cuda",
    "index": 0,
    "name": "Fixture GPU 80GB",
    "compute_capability": [9, 0],
    "memory_bytes": 80 * 2**30,
}
CPU = {
    "kind": "cpu",
    "index": 0,
    "name": "Fixture CPU",
    "compute_capability": None,
    "memory_bytes": 16 * 2**30,
}
Law = Callable[[int, int | None], float]  # (seqlen, d_state) -> seconds


@dataclass(frozen=True, kw_only=True)
class Made:
    """An invented implementation: how long it takes, and where it gives up."""

    name: str
    variant: str
    family: Family
    law: Law
    memory: Callable[[int], float]
    d_state: int | None = None
    end: Callable[[int], tuple[Outcome, str] | None] = lambda seqlen: None


def floor(seconds: float, law: Law) -> Law:
    return lambda n, s: seconds + law(n, s)


IMPLEMENTATIONS = (
    Made(
        name="flash_attention",
        variant="fa4",
        family=Family.ATTENTION,
        law=floor(2.2e-5, lambda n, _: 7e-12 * n * n + 6e-9 * n),
        memory=lambda n: 16384 * n,
    ),
    Made(
        name="selective_scan",
        variant="triton",
        family=Family.S6,
        law=floor(1.1e-5, lambda n, s: 1.2e-9 * n * (s or 16)),
        memory=lambda n: 12288 * n,
        d_state=16,
    ),
    Made(
        name="ssd",
        variant="triton",
        family=Family.SSD,
        law=floor(2.0e-5, lambda n, s: 7e-9 * n * (1 + (s or 128) / 128)),
        memory=lambda n: 13000 * n,
        d_state=128,
    ),
    Made(
        name="associative_scan",
        variant="torch",
        family=Family.S6,
        law=floor(2e-4, lambda n, s: 2e-7 * n),
        memory=lambda n: 2**20 * n,
        d_state=16,
        end=lambda n: (Outcome.OOM, f"needs {n // 1024} GiB of 79 GiB") if n > 65536 else None,
    ),
    Made(
        name="naive_recurrence",
        variant="torch",
        family=Family.S6,
        law=lambda n, s: 1.2e-4 * n,
        memory=lambda n: 14000 * n,
        d_state=16,
        end=lambda n: (Outcome.TIMEOUT, "exceeded 5 s") if n > 16384 else None,
    ),
    Made(
        name="naive_recurrence",
        variant="torch",
        family=Family.SSD,
        law=lambda n, s: 0.9e-4 * n,
        memory=lambda n: 14000 * n,
        d_state=128,
        end=lambda n: (Outcome.TIMEOUT, "exceeded 5 s") if n > 16384 else None,
    ),
)


def case(
    made: Made, seqlen: int, pass_: Pass, dtype: DType, state: int | None, level: Level
) -> Case:
    recurrent = made.family is not Family.ATTENTION
    problem = Problem(
        family=made.family,
        level=level,
        batch=1,
        seqlen=seqlen,
        d_inner=2048 if level is Level.OP else (2048 if recurrent else 1024),
        d_model=None if level is Level.OP else 1024,
        d_state=(state or made.d_state) if recurrent else None,
        headdim=64 if made.family is not Family.S6 else None,
        ngroups=1 if recurrent else None,
    )
    return Case(
        implementation=made.name, variant=made.variant, problem=problem, pass_=pass_, dtype=dtype
    )


def observe(asked: Case, made: Made, scale: float, clock: Iterator[int]) -> list[Observation]:
    """Invent the observations of a case: a time with its samples, and memory."""
    rng = random.Random(asked.case_id)
    n = asked.problem.seqlen
    second = next(clock)
    shared: dict[str, Any] = {
        "case": asked,
        "observation_id": f"{asked.case_id}-{second}",
        "started_at": f"2026-03-01T{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}Z",
        "duration_s": 1.0,
    }
    end = made.end(n)
    if end:
        return [Observation(measurement="time", outcome=end[0], reason=end[1], **shared)]
    time_s = made.law(n, asked.problem.d_state) * scale
    samples = tuple(time_s * (1 + abs(rng.gauss(0, 0.01))) for _ in range(31))
    modelled = {"model_flop": 4 * n * 2048 * 16, "compulsory_bytes": 2 * 4 * n * 2048}
    if asked.problem.level is Level.BLOCK:
        modelled["weight_count"] = 12 * 1024 * 1024
    values = {"time_s": sorted(samples)[15], "first_call_s": 0.8, **modelled}
    telemetry = {"before": {"sm_clock_hz": 1.98e9, "temperature_c": 41, "throttle_reasons": []}}
    details = {"convergence": {"converged": True}, "telemetry": telemetry}
    peak = int(made.memory(n) * (3 if asked.pass_ is not Pass.FORWARD else 1))
    return [
        Observation(
            measurement="time",
            outcome=Outcome.OK,
            method="cuda-graph",
            values=values,
            samples_s=samples,
            details=details,
            **shared,
        ),
        Observation(
            measurement="memory",
            outcome=Outcome.OK,
            values={"peak_memory_bytes": peak, "extra_memory_bytes": peak // 3},
            **shared,
        ),
    ]


def write_run(
    path: Path,
    observations: list[Observation],
    *,
    suite: str = "quick",
    device: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a run folder through the store, as the runner does."""
    manifest = {
        "schema": 1,
        "run_id": path.name,
        "created_at": "2026-03-01T00:00:00+00:00",
        "command": ["run_bench.py", "run", "--suite", suite],
        "suite": suite,
        "plan": [],
        "plan_hash": "fixture",
        "settings": {"seed": 0, "target_s": 0.5},
        "device": device or GPU,
        "environment": {
            "python": "3.12.3",
            "libraries": {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.1"},
            "gpu": {"uuid": "GPU-fixture", "driver": "580.0", "power_limit_w": 700},
        },
        "code": {"version": "0.1.0", "commit": "0123456789abcdef" * 2 + "01234567", "dirty": False},
        "plugins": [],
        "notes": [],
    } | changes
    # To wait for the disk at every line takes longer than most tests.
    with patch("os.fsync"), RunFolder.create(path, manifest) as folder:
        for observation in observations:
            folder.append(observation)
    return path


def gpu_observations() -> list[Observation]:
    clock = iter(range(100_000))
    found: list[Observation] = []
    passes = ((Pass.FORWARD, 1.0), (Pass.BACKWARD, 2.6), (Pass.TRAINING, 3.5))
    for made in IMPLEMENTATIONS:
        for pass_, scale in passes:
            for exponent in range(9, 18):
                asked = case(made, 2**exponent, pass_, DType.BF16, None, Level.OP)
                found += observe(asked, made, scale, clock)
        if made.d_state:
            for state in (32, 64, 256):
                asked = case(made, 4096, Pass.FORWARD, DType.BF16, state, Level.OP)
                found += observe(asked, made, 1.0, clock)
    for made in IMPLEMENTATIONS[:3]:
        for exponent in range(9, 16):
            asked = case(made, 2**exponent, Pass.FORWARD, DType.BF16, None, Level.BLOCK)
            found += observe(asked, made, 3.0, clock)
    return found


def hostile_observations() -> list[Observation]:
    clock = iter(range(100))
    bad = replace(
        IMPLEMENTATIONS[2], name=HOSTILE, variant=HOSTILE, end=lambda n: (Outcome.ERROR, HOSTILE)
    )
    good = replace(IMPLEMENTATIONS[1], name="<b>bold</b>", variant="{{ 7 * 7 }}")
    found: list[Observation] = []
    for made in (bad, good, IMPLEMENTATIONS[0]):
        for seqlen in (512, 1024, 2048):
            asked = case(made, seqlen, Pass.FORWARD, DType.BF16, None, Level.OP)
            found += observe(asked, made, 1.0, clock)
    return found


def cpu_observations() -> list[Observation]:
    clock = iter(range(1000))
    found: list[Observation] = []
    for made in IMPLEMENTATIONS:
        for seqlen in (128, 256, 512, 1024):
            asked = case(made, seqlen, Pass.FORWARD, DType.FP32, None, Level.OP)
            found += observe(asked, made, 300.0, clock)
    return found


KERNELS = [
    {"name": "<b>chunk_scan</b>", "count": 2, "time_s": 3e-5, "share": 0.75},
    {"name": "chunk_state", "count": 1, "time_s": 1e-5, "share": 0.25},
]
CEILINGS = {
    "copy": {"value": 3.0e12, "datasheet": 3.35e12},
    "matrix-bf16": {"value": 7.0e14, "datasheet": 9.895e14},
}


def measured(observation: Observation) -> list[Observation]:
    """Invent what further profilers find for a case that has a time."""
    case, compulsory = observation.case, observation.values["compulsory_bytes"]
    attention = case.implementation == "flash_attention"
    per_token_j = 1e-9 * case.problem.seqlen if attention else 4e-6  # equal at L = 4,000
    energy_j = per_token_j * case.tokens
    trace = [{"at_s": 0.05 * i, "power_w": 400.0 + i, "sm_clock_hz": 1.9e9} for i in range(5)]
    moved = {"dram_bytes": 2 * compulsory, "traffic_ratio": 2.0}
    found = {
        "launches": ({"kernel_count": 3, "max_registers": 64}, {"kernels": KERNELS}),
        "energy": (
            {"energy_j": energy_j, "power_w": 402.0, "tokens_per_j": case.tokens / energy_j},
            {"trace": trace},
        ),
        "traffic": (moved, {"kernels": [{"name": "chunk_scan", "dram_read_bytes": 7}]}),
        "sol": ({"sol_frac": 0.5}, {"ceiling": "copy"}),
    }
    return [
        replace(
            observation,
            measurement=name,
            values=values,
            details=details,
            samples_s=None,
            observation_id=f"{observation.observation_id}-{name}",
        )
        for name, (values, details) in found.items()
    ]


@pytest.fixture(name="write_run", scope="session")
def write_run_fixture():
    return write_run


@pytest.fixture(name="gpu_observations", scope="session")
def gpu_observations_fixture():
    return gpu_observations


@pytest.fixture(scope="session")
def gpu_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "gpu-run"
    return write_run(folder, gpu_observations(), suite="scan-vs-attention")


@pytest.fixture(scope="session")
def cpu_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "cpu-run"
    return write_run(folder, cpu_observations(), device=CPU, environment={"python": "3.11.0"})


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "hostile-run"
    return write_run(folder, hostile_observations(), suite=HOSTILE, notes=[HOSTILE])


@pytest.fixture(scope="session")
def full_run(tmp_path_factory):
    plain = gpu_observations()
    timed = [o for o in plain if o.measurement == "time" and o.outcome is Outcome.OK]
    extra = [made for o in timed for made in measured(o)]
    folder = tmp_path_factory.mktemp("full") / "full-run"
    return write_run(folder, plain + extra, ceilings={"ceilings": CEILINGS})


@pytest.fixture(scope="session")
def other_run(tmp_path_factory):
    """The same cases in half the time on a machine of another name, without ceilings."""
    faster = [
        replace(
            o,
            values={**o.values, **({"time_s": t / 2} if (t := o.values.get("time_s")) else {})},
            samples_s=None if o.samples_s is None else tuple(s / 2 for s in o.samples_s),
        )
        for o in gpu_observations()
    ]
    device = {"kind": "cuda", "name": "NVIDIA H200", "compute_capability": [9, 0]}
    folder = tmp_path_factory.mktemp("other") / "other-run"
    return write_run(folder, faster, device=device, created_at="2026-03-02T00:00:00+00:00")


@pytest.fixture(scope="session")
def gaps_run(tmp_path_factory):
    """A run in which some forward passes of both SSD implementations could not be captured."""
    asked = (Pass.FORWARD, Family.SSD)
    planted = [
        replace(o, method="events")
        if (o.case.pass_, o.case.problem.family) == asked and o.case.problem.seqlen > 1024
        else o
        for o in gpu_observations()
    ]
    return write_run(tmp_path_factory.mktemp("gaps") / "gaps-run", planted)


@pytest.fixture(scope="session")
def kernels():
    return KERNELS


@pytest.fixture(scope="session")
def report(gpu_run, cpu_run) -> Report:
    return rows.make(loading.load([gpu_run, cpu_run]))


@pytest.fixture(scope="session")
def gpu_report(gpu_run) -> Report:
    return rows.make(loading.load([gpu_run]))


@pytest.fixture(scope="session")
def chromium():
    """A headless browser, or a skip where Playwright or Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = Path("/usr/bin/chromium")
    if not executable.exists():
        pytest.skip("Chromium is not installed (apt install chromium)")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(executable), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def write_fixture_run() -> Callable[..., Path]:
    return write_run
