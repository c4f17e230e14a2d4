import os
import signal
from collections.abc import Iterator

import pytest

from mambench.harness import machine
from mambench.harness.errors import MeasurementError
from mambench.harness.spec import Case, DType, Family, Outcome, Pass, Problem, Settings
from mambench.harness.workers.guard import Limits, supervise
from mambench.harness.workers.pool import Pool, Worker, WorkerPool, signal_name
from mambench.harness.workers.protocol import Done, Precompile, Work, WorkerConfig
from mambench.harness.workers.spawn import SpawnPool

CASE = Case(
    implementation="absent",
    variant="v",
    problem=Problem(family=Family.ATTENTION, batch=1, seqlen=8, d_inner=8, headdim=8),
    pass_=Pass.FORWARD,
    dtype=DType.FP32,
)


@pytest.fixture(scope="module", params=[WorkerPool, SpawnPool])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with request.param(threads=1) as opened:
        yield opened


@pytest.fixture
def worker(pool: Pool) -> Iterator[Worker]:
    started = pool.worker(WorkerConfig(device=machine.cpu(), settings=Settings(), threads=1))
    yield started
    if not started.connection.closed:
        started.kill()


def test_worker_answers_dies_and_tells_how(worker: Worker) -> None:
    worker.send(Precompile(cases=(CASE,)))
    answer = worker.receive(60.0)
    assert isinstance(answer, Done)
    assert "absent" in (answer.reason or "")
    os.kill(worker.pid, signal.SIGTERM)
    with pytest.raises(EOFError):
        worker.receive(60.0)
    assert worker.kill() == -signal.SIGTERM


def test_idle_worker_ends_when_its_connection_is_closed(worker: Worker) -> None:
    worker.send(Precompile(cases=(CASE,)))
    assert isinstance(worker.receive(60.0), Done)
    assert worker.end() == 0


def test_an_unknown_implementation_is_the_case_s_error(worker: Worker) -> None:
    done, alive = supervise(
        worker,
        Work(case=CASE, measurements=("time",), gate=True, limit_s=10),
        Limits(set_up_s=60, measure_s=60, memory_bytes=1 << 40),
        on_phase=lambda phase: None,
        on_finding=lambda finding: None,
    )
    assert alive
    assert done.replace
    assert done.outcome is Outcome.ERROR
    assert "unknown implementation 'absent'" in (done.reason or "")


def test_a_server_that_is_gone_is_a_measurement_error() -> None:
    with WorkerPool(threads=1) as opened:
        opened._server.kill()  # before it has imported torch
        with pytest.raises(MeasurementError, match="import torch"):
            opened.worker(WorkerConfig(device=machine.cpu(), settings=Settings(), threads=1))


def test_signals_have_names() -> None:
    assert signal_name(-11) == "SIGSEGV"
    assert signal_name(-99) == "signal 99"


def test_server_imports_no_cuda_and_no_numba(pool: Pool) -> None:
    if not isinstance(pool, WorkerPool):
        pytest.skip("this pool has no server")
    pool.worker(WorkerConfig(device=machine.cpu(), settings=Settings(), threads=1)).kill()
    with open(f"/proc/{pool._server.pid}/maps") as file:
        mapped = file.read()
    assert "torch" in mapped
    assert "numba" not in mapped
    assert "libcuda.so" not in mapped
