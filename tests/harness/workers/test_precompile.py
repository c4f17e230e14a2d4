"""How cases are divided among the workers that compile ahead."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from mambench.harness.progress import SilentListener
from mambench.harness.spec import (
    Case,
    Device,
    DeviceKind,
    DType,
    Family,
    Pass,
    Problem,
    Settings,
)
from mambench.harness.workers import precompile
from mambench.harness.workers.protocol import Done, Precompile, WorkerConfig

_PATH = Path(__file__).parent.parent.parent / "faults" / "planning.py"
_SPEC = importlib.util.spec_from_file_location("planning_of_precompile", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
planning = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(planning)

CPU, GPU = (
    Device(kind=kind, index=0, name="some", memory_bytes=1 << 36)
    for kind in (DeviceKind.CPU, DeviceKind.CUDA)
)


@pytest.mark.parametrize(("on_gpu", "expected"), [(False, [1]), (True, [3])])
def test_lengths_are_told_apart_on_a_gpu_only(on_gpu: bool, expected: list[int]) -> None:
    cases = [planning.case("good", seqlen=n) for n in (8, 9, 10, 10)]
    groups = precompile._groups(cases, on_gpu=on_gpu)
    assert [len(group) for group in groups] == expected
    assert groups[0][0] == cases[0]


def test_passes_and_variants_compile_side_by_side_on_a_gpu() -> None:
    case = planning.case("good")
    cases = [case, replace(case, pass_=Pass.TRAINING), replace(case, variant="other")]
    assert precompile._groups(cases, on_gpu=True) == [[each] for each in cases]
    assert precompile._groups(cases, on_gpu=False) == [cases]


def test_a_training_step_has_what_a_backward_needs() -> None:
    training = replace(planning.case("good"), pass_=Pass.TRAINING)
    cases = [replace(training, pass_=Pass.BACKWARD), training]
    assert precompile._groups(cases, on_gpu=True) == [[training]]


def test_much_to_compile_is_divided_and_begun_last() -> None:
    ssd = Problem(family=Family.SSD, batch=1, seqlen=64, d_inner=64, d_state=16, headdim=64)
    cases = [
        Case(implementation=name, variant="v", problem=ssd, pass_=Pass.TRAINING, dtype=DType.BF16)
        for name in ("mamba_ssm_ssd", "ssd")
    ]
    jobs = precompile._jobs(cases, on_gpu=True, parallel=4)
    assert [(job.cases[0].implementation, job.share, job.shares) for job in jobs] == [
        ("ssd", 0, 1),
        *(("mamba_ssm_ssd", share, 4) for share in range(4)),
    ]
    assert len(precompile._jobs(cases, on_gpu=False, parallel=4)) == 2


def test_the_longest_job_bounds_the_time_that_is_announced(monkeypatch) -> None:
    ssd = Problem(family=Family.SSD, batch=1, seqlen=64, d_inner=64, d_state=16, headdim=64)
    case = Case(
        implementation="mamba_ssm_ssd",
        variant="v",
        problem=ssd,
        pass_=Pass.TRAINING,
        dtype=DType.BF16,
    )
    monkeypatch.setattr(precompile, "_parallel", lambda: 2)
    two = precompile.seconds([case], GPU)
    monkeypatch.setattr(precompile, "_parallel", lambda: 1)
    one = precompile.seconds([case], GPU)
    alone_s = precompile._compile_s(case)
    assert alone_s > 60
    assert one == pytest.approx(precompile.START_S + alone_s)
    assert two == pytest.approx(precompile.START_S + alone_s / 2)
    longer = replace(case, problem=replace(ssd, seqlen=128))
    again = precompile.seconds([case, longer], GPU)
    assert again == pytest.approx(one + precompile.AGAIN_FRAC * alone_s)
    assert precompile.seconds([case], CPU) == 0
    assert precompile.seconds([], GPU) == 0


def test_only_what_compiles_gets_a_worker() -> None:
    assert precompile._compiles("ssd")
    assert not precompile._compiles("flash_attention")
    assert precompile._compiles("known to a worker's plugin only")


class Compiler:
    """A worker of a pool that remembers what it was told; the fifth never answers."""

    def __init__(self, pool: "Compilers") -> None:
        self.pool, self.number = pool, len(pool.told)
        pool.busy += 1
        pool.busiest = max(pool.busiest, pool.busy)

    def send(self, message: Precompile) -> None:
        self.pool.told.append(message)

    def receive(self, timeout_s: float) -> Done | None:
        self.pool.now += 1.0
        return None if self.number == 4 else Done()

    def kill(self) -> None:
        self.pool.busy -= 1


class Compilers:
    def __init__(self) -> None:
        self.told: list[Precompile] = []
        self.busy = self.busiest = 0
        self.now = 0.0

    def worker(self, config: WorkerConfig) -> Compiler:
        return Compiler(self)


class Notes(SilentListener):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.phases: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_phase(self, case: Case, phase: str) -> None:
        self.phases.append(phase)


def test_every_share_is_compiled_by_a_worker_and_a_stuck_one_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr(precompile, "_parallel", lambda: 3)
    monkeypatch.setattr(precompile, "MAX_PARALLEL", 3)
    ssd = Problem(family=Family.SSD, batch=1, seqlen=64, d_inner=64, d_state=16, headdim=64)
    cases = [
        Case(implementation=name, variant="v", problem=ssd, pass_=Pass.BACKWARD, dtype=DType.BF16)
        for name in ("mamba_ssm_ssd", "ssd", "fla_simple_gla")
    ]
    config = WorkerConfig(device=GPU, settings=Settings(compile_limit_s=30.0), threads=1)
    pool, notes = Compilers(), Notes()
    precompile.compile_ahead(cases, pool, config, notes, clock=lambda: pool.now)
    told = [(m.cases[0].implementation, m.share, m.shares) for m in pool.told]
    assert told == [
        ("ssd", 0, 1),
        *(("mamba_ssm_ssd", share, 3) for share in range(3)),
        *(("fla_simple_gla", share, 3) for share in range(3)),
    ]
    assert all(m.cases[0].pass_ is Pass.TRAINING for m in pool.told)
    assert notes.phases[0] == "compiling ahead 1 of 7"
    assert any("fla_simple_gla ahead took too long" in note for note in notes.notes)
    assert notes.notes[-1].startswith("compiled ahead in ")
    assert (pool.busiest, pool.busy) == (3, 0)
