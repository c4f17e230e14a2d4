"""The program that is profiled, run on the CPU with the device's calls replaced by notes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mambench.harness.counters import child as counters_child
from mambench.harness.spec import Case, DType, Family, Pass, Problem
from mambench.implementations import workload

PLUGIN = Path(__file__).parent.parent.parent / "faults" / "planted.py"


def case(name: str, seqlen: int = 16) -> Case:
    problem = Problem(family=Family.ATTENTION, batch=1, seqlen=seqlen, d_inner=16, headdim=8)
    return Case(
        implementation=name,
        variant="planted",
        problem=problem,
        pass_=Pass.BACKWARD,
        dtype=DType.FP32,
    )


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken: list[str] = []

    class Buffer:
        l2_bytes = 1 << 20

        def read(self) -> None:
            taken.append("read")

        def describe(self) -> dict[str, Any]:
            return {"l2_bytes": 1}

    def start(name: str) -> str:
        taken.append(f"start {name.split('-')[2]}")
        return name

    monkeypatch.setattr(counters_child, "_Buffer", Buffer)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", start)
    monkeypatch.setattr(
        torch.cuda.nvtx, "range_end", lambda name: taken.append(f"end {name.split('-')[2]}")
    )
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: (taken.append("execute"), grad(*a, **k))[1]
    )
    return taken


def run(
    tmp_path: Path, *items: dict[str, Any], ranges: bool = False
) -> tuple[int, list[dict[str, Any]]]:
    request, report = tmp_path / "request.json", tmp_path / "report.jsonl"
    device = {
        "kind": "cpu",
        "index": 0,
        "name": "cpu",
        "compute_capability": None,
        "memory_bytes": 1 << 30,
    }
    values = {
        "device": device,
        "seed": 0,
        "runner": os.getpid(),
        "plugins": [str(PLUGIN)],
        "sys_path": [],
        "items": list(items),
        "ranges": ranges,
    }
    request.write_text(json.dumps(values))
    status = counters_child.main([str(request), str(report)])
    return status, [json.loads(line) for line in report.read_text().splitlines()]


def test_one_execution_lies_in_the_range_between_two_readings_of_the_buffer(tmp_path, notes):
    status, told = run(tmp_path, {"id": "abc", "case": case("good").to_dict()})
    assert status == 0
    assert notes == [
        *("start run", "read", "end run", "start drain", "read", "end drain"),  # forgotten
        *("execute", "execute"),  # warm: compiled, tuned, loaded
        *("read", "start run", "execute", "end run"),
        *("start drain", "read", "end drain"),
    ]
    assert [m["event"] for m in told] == ["start", "ready", "begin", *["phase"] * 3, "end"]
    assert told[-1]["outcome"] == "ok"


@pytest.fixture
def ranges(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: notes.append(name))
    return notes


def test_a_range_lies_between_the_profiler_s_start_and_stop(tmp_path, ranges):
    _, told = run(tmp_path, {"id": "abc", "case": case("good").to_dict()}, ranges=True)
    assert ranges[10:] == [
        *("execute", "execute", "read"),
        *("start run", "start", "execute", "stop", "end run"),
        *("start drain", "start", "read", "stop", "end drain"),
    ]
    names = [m["name"] for m in told if m["event"] == "range"]
    assert names == [
        f"mambench-{of}" for of in ("prime-run", "prime-drain", "abc-run", "abc-drain")
    ]
    assert next(m for m in told if m["event"] == "ready")["known_bytes"] == 5 << 20
    assert told[-1]["outcome"] == "ok"


def test_a_long_case_is_warmed_up_at_a_few_steps(tmp_path, ranges, monkeypatch):
    lengths: list[int] = []
    build = workload.build

    def noted(asked: Case, *more: Any, **options: Any) -> Any:
        lengths.append(asked.problem.length)
        return build(asked, *more, **options)

    monkeypatch.setattr(workload, "build", noted)
    long = case("good", seqlen=counters_child.WARM_STEPS + 1)
    run(tmp_path, {"id": "abc", "case": long.to_dict()}, ranges=True)
    assert lengths == [counters_child.WARM_STEPS, counters_child.WARM_STEPS + 1]
    run(tmp_path, {"id": "abc", "case": long.to_dict()})
    assert lengths[2:] == [counters_child.WARM_STEPS + 1]


def test_the_known_copy_copies_everything_in_many_launches(monkeypatch):
    tensors: list[torch.Tensor] = []
    ones, like = torch.ones, torch.empty_like
    monkeypatch.setattr(torch, "ones", lambda count, **_: tensors.append(ones(count)) or tensors[0])
    monkeypatch.setattr(torch, "empty_like", lambda t: tensors.append(like(t)) or tensors[1])
    copy = counters_child._probe({"id": "known", "known": True}, 1 << 16)
    calls: list[int] = []
    add = torch.add
    monkeypatch.setattr(torch, "add", lambda *a, **k: (calls.append(1), add(*a, **k))[1])
    copy()
    assert len(calls) == counters_child.KNOWN_LAUNCHES
    assert tensors[1].numel() * 4 == 5 << 16
    assert (tensors[1] == 2).all()


def test_a_case_that_raises_is_reported_and_the_next_goes_on(tmp_path, notes):
    status, told = run(
        tmp_path,
        {"id": "bad", "case": case("raises").to_dict()},
        {"id": "declined", "case": case("refuses").to_dict()},
        {"id": "abc", "case": case("good").to_dict()},
    )
    ends = {m["id"]: (m["outcome"], m.get("reason")) for m in told if m["event"] == "end"}
    assert status == 0
    assert ends == {
        "bad": ("error", "ValueError: planted fault"),
        "declined": ("unsupported", "NotImplementedError: headdim 8 is too small"),
        "abc": ("ok", None),
    }


def test_a_damaged_context_asks_for_another_process(tmp_path, notes, monkeypatch):
    def broken() -> None:
        if "execute" in notes:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    status, told = run(
        tmp_path,
        {"id": "bad", "case": case("good").to_dict()},
        {"id": "abc", "case": case("good").to_dict()},
    )
    assert status == counters_child.BROKEN_STATUS
    assert [m["id"] for m in told if m["event"] == "end"] == ["bad"]
    assert told[-1]["outcome"] == "error"
    assert "illegal memory access" in told[-1]["reason"]


@pytest.mark.parametrize("gone", ["runner", "ncu"])
def test_it_ends_with_the_runner_and_with_ncu(monkeypatch: pytest.MonkeyPatch, gone: str):
    killed: list[tuple[int, int]] = []
    looks: list[float] = []
    monkeypatch.setattr(counters_child.os, "kill", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(
        counters_child.os, "getppid", lambda: 2 if gone == "ncu" and len(looks) > 1 else 1
    )
    monkeypatch.setattr(
        counters_child.os.path, "exists", lambda path: gone == "ncu" or len(looks) < 2
    )
    monkeypatch.setattr(counters_child.time, "sleep", looks.append)
    counters_child._end_with(4242, 1)
    assert len(looks) == 2
    assert killed == [(os.getpid(), signal.SIGKILL)]
