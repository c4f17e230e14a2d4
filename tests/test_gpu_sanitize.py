"""The sanitizer's driver without a GPU: how it classifies, and that its parts are sound."""

import ast
import importlib.util
import re
import stat
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location(
    "gpu_sanitize", Path(__file__).with_name("gpu_sanitize.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
gpu_sanitize = importlib.util.module_from_spec(_SPEC)
sys.modules["gpu_sanitize"] = gpu_sanitize
_SPEC.loader.exec_module(gpu_sanitize)


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Put a compute-sanitizer on the PATH that ends with a given status."""

    def planted(status: int, says: str = "========= Invalid __global__ write") -> None:
        script = tmp_path / "compute-sanitizer"
        script.write_text(f'#!/bin/sh\necho "{says}"\nexit {status}\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return planted


@pytest.mark.parametrize(("exit_status", "status"), [(0, "ok"), (86, "found"), (1, "failed")])
def test_what_the_tool_says_is_the_result(tool, exit_status, status):
    tool(exit_status)
    result = gpu_sanitize.run("state update", "memcheck", 20.0)
    assert result.status == status
    assert result.good == (status == "ok")
    assert "Invalid __global__ write" in result.text


def test_findings_are_shown_and_fail(tool, monkeypatch, capsys):
    tool(86)
    real = gpu_sanitize.run
    monkeypatch.setattr(gpu_sanitize, "run", lambda p, t, s: real(p, t, s) if t else result(p, t))
    monkeypatch.setattr(sys, "argv", ["gpu_sanitize.py", "--part", "state update"])
    assert gpu_sanitize.main() == 1
    printed = capsys.readouterr().out
    assert printed.count("Invalid __global__ write") == len(gpu_sanitize.TOOLS)
    assert "found      racecheck" in printed
    assert printed.count("noticed") == len(gpu_sanitize.PLANTED)
    assert {tool for tool, _ in gpu_sanitize.PLANTED.values()} == set(gpu_sanitize.TOOLS)


REPORTED = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at hand_over_kernel+{read:#x} in races.py:60
=========     and Write access at hand_over_kernel+{first:#x} in races.py:60 [4 hazards]
=========     and Write access at hand_over_kernel+{second:#x} in races.py:62 [16 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def result(part, tool, text="", status="ok", excusable=False):
    return gpu_sanitize.Result(
        part=part, tool=tool, text=text, status=status, excusable=excusable, seconds=1.0
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile the kernels with races, and the hand-over with and without a barrier before it."""
    pytest.importorskip("triton.experimental.gluon")
    from mambench.harness.static.record import record

    races, folder = gpu_sanitize.parts().races(), tmp_path_factory.mktemp("kernels")
    runs = {
        "alone": races.hand_over,
        "behind": lambda: races.hand_over(barriers=1),
        "racing": races.unsynchronised,
        "handed": races.handed,
        "in order": lambda: races.barriers(True),
        "out of order": lambda: races.barriers(False),
    }
    for name, run in runs.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "cuda", lambda self: self.to("meta"))
            (launch,) = record(lambda draw, run=run: run(), 90)
        (folder / name).mkdir()
        made = launch.compile().asm
        (folder / name / f"{launch.name}.cubin").write_bytes(made["cubin"])
        (folder / name / "ptx").write_text(made["ptx"])
    return folder


def code_of(folder):
    (code,) = gpu_sanitize.disassembled(folder, "*")
    return code


def places(code, what):
    return [at for at, text in sorted(code.items()) if text.startswith(what)]


def reported(folder):
    """Return what racecheck says of a hand-over, by this machine code's addresses."""
    code = code_of(folder)
    (read,) = places(code, "LDS.U8")
    first, *_, second = places(code, "STS")
    return REPORTED.format(read=read, first=first, second=second), read, second


def test_a_hand_over_to_partitions_is_excused(compiled):
    folder = compiled / "behind"
    text, read, second = reported(folder)
    assert gpu_sanitize.is_excusable(text, folder)
    other = places(code_of(folder), "LDG")[0]
    for wrong in (
        text.replace(f"{read:#x}", f"{other:#x}"),  # another instruction
        text.replace(f"{second:#x}", f"{other:#x}"),
        text.replace("Read access", "Write access"),  # not what the code does there
        text.replace("hand_over_kernel", "unsynchronised_kernel"),
        text.replace("SUMMARY: 1 hazard", "SUMMARY: 2 hazards"),  # one that is not shown
        "========= RACECHECK SUMMARY: 0 hazards displayed",
    ):
        assert not gpu_sanitize.is_excusable(wrong, folder), wrong


def test_a_hand_over_without_a_barrier_before_it_is_not_excused(compiled):
    text, _, _ = reported(compiled / "alone")
    assert not gpu_sanitize.is_excusable(text, compiled / "alone")


def test_a_race_between_partitions_is_not_excused(compiled):
    code = code_of(compiled / "racing")
    (read,), (write,) = places(code, "LDS.64"), places(code, "STS.64")
    text = REPORTED.replace("hand_over", "unsynchronised")
    text = text.format(read=read, first=write, second=write)
    assert not gpu_sanitize.is_excusable(text, compiled / "racing")


def test_excuses_need_the_tool_to_be_mistaken_and_able_in_the_same_run():
    found = result("ssd", "racecheck", status="found", excusable=True)
    planted = next(name for name, (tool, _) in gpu_sanitize.PLANTED.items() if tool == "racecheck")
    (in_order,) = gpu_sanitize.IN_ORDER
    for mistaken, noticed, status in (
        ("mistaken", "noticed", "excused"),
        ("ok", "noticed", "found"),  # the tool is not mistaken any more
        ("mistaken", "missed", "found"),
    ):
        others = [
            result(in_order, "racecheck", status=mistaken),
            result(planted, "racecheck", status=noticed),
        ]
        alone = [result(name, None) for name in ("ssd", in_order, planted)]
        judged = gpu_sanitize.judge(alone, [*others, found])
        assert judged[-1].status == status
    hidden = result(planted, "racecheck", status="noticed", excusable=True)  # by the excuse
    others[1] = hidden
    assert gpu_sanitize.judge(alone, [*others, found])[-1].status == "found"


def test_other_bits_under_a_tool_are_wrong():
    alone = result("ssd", None, "digest 0a\n")
    same, other = (result("ssd", "memcheck", f"=====\ndigest {bits}\n") for bits in ("0a", "0b"))
    judged = gpu_sanitize.judge([alone], [same, other, result("ssd", "initcheck")])
    assert [found.status for found in judged] == ["ok", "other bits", "ok"]
    assert [found.good for found in judged] == [True, False, True]


def test_every_bit_of_what_a_part_computed_counts():
    digest = gpu_sanitize.parts().digest
    x = torch.arange(8, dtype=torch.bfloat16).view(2, 4)
    assert digest([x.T, (None, x)]) == digest((x.T.contiguous(), [x.clone()]))
    for other in ([x, x], [x.T], [x.T, x.float()], [x.T, -x]):
        assert digest(other) != digest([x.T, x])


def test_every_thread_arrives_where_one_did(compiled):
    parts = gpu_sanitize.parts()
    ptx = (compiled / "handed" / "ptx").read_text()
    init, arrive = "mbarrier.init.shared::cta.b64", "mbarrier.arrive.shared::cta.b64"
    alone = re.search(rf"@%p\d+ {arrive} _, \[%r\d+\];", ptx)[0]
    changed = parts.all_arriving(ptx, (128,))
    assert re.findall(rf"{init} \[%r\d+\], (\d+);", changed) == ["128"]
    assert alone not in changed
    assert alone.partition(" ")[2] in changed
    several = "\n".join(f"{init} [%r{i}], {1 + i % 2};" for i in range(4))
    assert re.findall(r"(\d+);", parts.all_arriving(several, (1, 128))) == ["1", "256", "1", "256"]


def test_a_barrier_of_all_lies_between_what_is_in_order(compiled):
    """In every path: the machine code has neither a branch before the read nor another barrier."""
    kept = ("STS", "LDS", "BAR", "BRA", "EXIT")
    for name, between in (("in order", ["BAR"]), ("out of order", [])):
        code = code_of(compiled / name)
        texts = [text for _, text in sorted(code.items()) if text.startswith(kept)]
        names = [next(kind for kind in kept if text.startswith(kind)) for text in texts]
        assert names[: 4 + len(between)] == ["BAR", "STS", *between, "LDS", "EXIT"]
        assert texts[0].endswith("0x2, 0x80")
        assert [text.split()[-1] for text in texts[2 : 2 + len(between)]] == ["0x3"] * len(between)


@pytest.mark.parametrize(("exit_status", "status"), [(0, "missed"), (86, "noticed")])
def test_what_is_planted_must_be_found(tool, exit_status, status):
    tool(exit_status)
    found = gpu_sanitize.run(next(iter(gpu_sanitize.PLANTED)), "racecheck", 20.0)
    assert found.status == status
    assert found.good == (status == "noticed")


def test_without_the_tool_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_sanitize.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["gpu_sanitize.py"])
    assert gpu_sanitize.main() == 2
    assert "CUDA toolkit" in capsys.readouterr().out


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self.to("meta"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def kernels_of_the_package() -> set[tuple[str, str]]:
    """Return module and name of every compiled function that no other one uses: what is launched.

    By the source alone: a function with a decorator that ends in "jit", of Triton or Gluon.
    """
    found, used = set(), set()
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            decorators = {ast.unparse(d).partition("(")[0] for d in node.decorator_list}
            if decorators & {"triton.jit", "gluon.jit"}:
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.add((module, node.name))
                names = [part for line in node.body for part in ast.walk(line)]
                used |= {part.id for part in names if isinstance(part, ast.Name)}
                used |= {part.attr for part in names if isinstance(part, ast.Attribute)}
    return {(module, name) for module, name in found if name not in used}


def launched(part) -> set[tuple[str, str]]:
    """Return module and name of what a part launches on an H100."""
    from mambench.harness.static.record import record

    launches = record(lambda draw: part(), 90)
    kernels = [launch.kernel.fn for launch in launches]
    return {(fn.__module__.removeprefix("mambench."), fn.__name__) for fn in kernels}


def test_every_kernel_is_run_by_some_part(without_gpu):
    pytest.importorskip("triton.experimental.gluon")
    kernels = kernels_of_the_package()
    assert {name for _, name in kernels} >= {"fused_kernel", "whole_kernel", "serial_scan_kernel"}
    run = {name: launched(part) for name, part in gpu_sanitize.PARTS.items()}
    forgotten = kernels - set().union(*run.values())
    assert not forgotten, "these are in no part of tests/sanitized_parts.py"
    del run["ssd hopper, one launch"], run["ssd hopper, one launch, all arrive"]  # without them:
    missing = {("kernels.ssd.hopper_fused_kernel", "fused_kernel")}
    assert kernels - set().union(*run.values()) == missing


def test_the_walk_is_run_in_all_its_forms(without_gpu):
    pytest.importorskip("triton.experimental.gluon")
    from mambench.harness.static.record import record

    launches = record(lambda draw: gpu_sanitize.PARTS["ssd hopper, forward"](), 90)
    forms = {
        tuple(launch.signature[name] != "constexpr" for name in ("dt_ptr", "slots", "z_desc"))
        for launch in launches
        if launch.kernel.fn.__name__ == "walk_kernel"
    }
    alone, behind, several, one = True, False, True, False
    assert {form[:2] for form in forms} == {(alone, several), (behind, several), (behind, one)}
    assert {form[2] for form in forms if form[1] is several} == {True, False}  # gated or not


def test_the_problems_are_ones_that_the_operations_take(monkeypatch):
    """On the CPU's implementations of the same interfaces."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    parts = gpu_sanitize.parts()
    parts.s6("kernels.scan_torch", 4)
    parts.ssd("kernels.ssd.torch_ssd.ssd", 8, 16)
