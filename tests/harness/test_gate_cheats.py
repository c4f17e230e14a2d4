"""The known ways to fool a benchmark, planted: each ends as `wrong`, and the reason names it."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mambench.harness import gate, gate_cheats, runner
from mambench.harness.lock import device_lock
from mambench.harness.spec import Outcome
from mambench.harness.workers.pool import WorkerPool

FAULTS = Path(__file__).parent.parent / "faults"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FAULTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


planning = load("planning")

REASONS = {
    "never_writes": "never written",
    "caches_result": "returned again (cached)",
    "caches_copy": "returned again (cached)",
    "caches_once_proven": "after timing, the same inputs gave another result",
    "reuses_buffer": "the second call overwrote the first call's result",
    "aliases_input": "shares its memory with the input v (aliased)",
    "changes_input": "k: the operation changed its input",
    "lazy": "may not be evaluated lazily",
    "leaves_thread": "work left on a thread or on another stream",
}


@pytest.fixture(scope="module")
def observations(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("cheats")
    names = [*REASONS, "good"]
    made = planning.plan([planning.case(name, seqlen=200) for name in names])
    made = replace(made, plugins=(str(FAULTS / "cheats.py"), *made.plugins))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runner, "device_lock", lambda key, **options: device_lock(key, folder=path, **options)
        )
        with WorkerPool(threads=1) as pool, planning.folder(path / "run", made) as folder:
            runner.run(made, folder, pool=pool)
            return {(o.case.implementation, o.measurement): o for o in folder.observations()}


@pytest.mark.parametrize("name", REASONS)
def test_a_cheat_ends_as_wrong_and_is_named(name: str, observations) -> None:
    found = observations[name, "time"]
    assert found.outcome is Outcome.WRONG, found.reason
    assert REASONS[name] in found.reason
    assert not found.values
    assert found.samples_s is None


def test_the_same_code_without_a_cheat_is_timed(observations) -> None:
    found = observations["good", "time"]
    assert found.outcome is Outcome.OK, found.reason
    assert found.details["gate"]["checked_again"] is True


def test_a_sketch_knows_a_result_again_but_not_another() -> None:
    generator = torch.Generator().manual_seed(0)
    result = torch.randn(3, 1001, generator=generator)
    sketch = gate_cheats.Sketch.of(result)
    rounding = 1e-3 * torch.randn(3, 1001, generator=generator)
    assert not sketch.differs(gate_cheats.Sketch.of(result + rounding))
    assert sketch.differs(gate_cheats.Sketch.of(-result))
    assert sketch.differs(gate_cheats.Sketch.of(torch.randn(3, 1001, generator=generator)))
    assert sketch.differs(gate_cheats.Sketch.of(result.roll(1)))
    assert sketch.differs(gate_cheats.Sketch.of(torch.full((3, 1001), torch.nan)))


def test_a_sketch_of_a_long_result_sees_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_cheats, "CHUNK", 128)
    result = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    sketch = gate_cheats.Sketch.of(result)
    assert not sketch.differs(gate_cheats.Sketch.of(result.clone()))
    for part in range(0, 1000, 200):
        other = result.clone()
        other[part : part + 200] *= -1
        assert sketch.differs(gate_cheats.Sketch.of(other)), part


class Queue:
    """A stream on the CPU: what is queued while it is held is done when it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        self.waiting: list[Callable[[], object]] | None = None
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(gate_cheats, "hold_stream", self.hold)

    def hold(self) -> None:
        self.waiting = []

    def wait(self) -> None:
        waiting, self.waiting = self.waiting or [], None
        for work in waiting:
            work()

    def put(self, work: Callable[[], object]) -> None:
        if self.waiting is None:
            work()
        else:
            self.waiting.append(work)

    @contextmanager
    def altered(self):
        self.put(self.inputs.neg_)
        yield
        self.put(self.inputs.neg_)


def test_work_that_waits_for_its_stream_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch)
    before = queue.inputs.clone()

    def execute() -> list[torch.Tensor]:
        out = torch.empty_like(queue.inputs)
        queue.put(lambda: out.copy_(2 * queue.inputs + 1))
        return [out, queue.inputs, torch.ones(3, dtype=torch.int32), torch.empty(0)]

    gate_cheats.require_stream_order(execute, queue.altered, [queue.inputs])
    assert torch.equal(queue.inputs, before)


def test_work_on_a_stream_that_does_not_wait_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch)
    with pytest.raises(gate_cheats.RejectedError, match="work left on another stream"):
        gate_cheats.require_stream_order(
            lambda: [2 * queue.inputs + 1], queue.altered, [queue.inputs]
        )


def test_a_kernel_that_is_loaded_behind_the_held_stream_hides_nothing(monkeypatch) -> None:
    """To load a kernel CUDA may wait for the device: planted for the first that alters inputs."""
    queue = Queue(monkeypatch)
    loaded: list[bool] = []
    put = queue.put

    def load_first(work: Callable[[], object]) -> None:
        if not loaded:
            loaded.append(True)
            queue.wait()
        put(work)

    monkeypatch.setattr(queue, "put", load_first)
    with pytest.raises(gate_cheats.RejectedError, match="work left on another stream"):
        gate_cheats.require_stream_order(
            lambda: [2 * queue.inputs + 1], queue.altered, [queue.inputs]
        )


def test_a_capture_that_ends_without_its_streams_tells_of_work_left() -> None:
    said = "AcceleratorError: CUDA error: capturing stream has unjoined work"
    assert "another stream" in (gate_cheats.unjoined(said) or "")
    assert gate_cheats.unjoined("operation not permitted when stream is capturing") is None
    assert gate_cheats.unjoined(None) is None


@pytest.mark.gpu
def test_work_left_on_another_stream_is_caught() -> None:
    workload, _ = gpu_workload("leaves_stream")
    with torch.cuda.stream(torch.cuda.Stream()):
        reason = gate.check_order(workload, workload.prepare(workload.case.pass_))
    assert reason is not None
    assert "another stream" in reason


REPLAYED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("cheats", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
workload, _ = tests.gpu_workload("leaves_stream")
with tests.torch.cuda.stream(tests.torch.cuda.Stream()):
    execute = workload.prepare(workload.case.pass_)
    execute()
    tests.torch.cuda.synchronize()
    print(tests.gate.check_replay(workload, execute))
"""


@pytest.mark.gpu
def test_work_left_on_another_stream_is_caught_by_its_capture() -> None:
    """In a process of its own: a capture that fails can leave torch unfit for other tests."""
    start = Path(__file__).parents[2] / "mambench" / "_start.py"
    code = (
        f"import runpy\nfrom pathlib import Path\nstart = Path({str(start)!r})\n"
        "runpy.run_path(str(start))['load_package'](start.parent)\n" + REPLAYED
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__], capture_output=True, text=True, check=False
    )
    assert "another stream" in done.stdout, done.stdout + done.stderr


@pytest.mark.gpu
def test_streams_that_are_forked_and_joined_again_are_in_order() -> None:
    workload, _ = gpu_workload("good")
    inner, side = workload.prepare(workload.case.pass_), torch.cuda.Stream()

    def execute() -> object:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = inner()
        current.wait_stream(side)
        return result

    with torch.cuda.stream(torch.cuda.Stream()):
        assert gate.check_order(workload, execute) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["caches_result", "caches_copy"])
def test_a_result_cached_before_the_capture_is_caught(name: str) -> None:
    workload, case = gpu_workload(name)
    report = gate.check(workload, case, seed=0)
    assert not report.passed
    assert report.reason is not None
    assert "cached" in report.reason


@pytest.mark.gpu
def test_a_replay_of_an_honest_call_passes_and_leaves_the_inputs() -> None:
    workload, case = gpu_workload("good")
    before = {name: tensor.clone() for name, tensor in workload.inputs.items()}
    with torch.cuda.stream(torch.cuda.Stream()):
        report = gate.check(workload, case, seed=0)
        assert report.passed, report.reason
        assert gate.check_replay(workload, workload.prepare(case.pass_)) is None
        assert gate.check_again(workload, case, report, seed=0) is None
    for name, tensor in workload.inputs.items():
        assert torch.equal(tensor, before[name])


def gpu_workload(name: str):
    """Return a workload of a planted implementation on the GPU, and its case."""
    from mambench.harness.spec import Device, DeviceKind
    from mambench.implementations.workload import build

    case = planning.case(name, seqlen=2048)
    module = load("cheats") if name != "good" else load("planted")
    made = next(
        value()
        for value in vars(module).values()
        if isinstance(value, type) and getattr(value, "name", None) == name
    )
    device = Device(kind=DeviceKind.CUDA, name="gpu", memory_bytes=1 << 34)
    return build(case, made, device, seed=0), case
