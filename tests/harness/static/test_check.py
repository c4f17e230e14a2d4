"""Kernels judged without a GPU: planted spills, loads and barriers are caught, a rebuild is not."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from mambench.harness.check.sides import Wanted
from mambench.harness.errors import MeasurementError, UsageError
from mambench.harness.static import check as static_check
from mambench.harness.static import child as static_child
from mambench.harness.static.binary import Binary
from mambench.harness.static.record import record
from mambench.harness.verdict import Verdict

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURE = 90
KERNEL = """
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def doubled(x):
    return x * 2.0


@triton.jit
def centre(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    mean = tl.sum(x) / n
    tl.store(out_ptr + i, doubled(x) - mean, mask=i < n)


def run(x, out):
    centre[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK, num_warps=1)
"""
CHANGES = {
    "a larger block": ("BLOCK = 1024", "BLOCK = 16384"),
    "an added load": ("tl.sum(x) / n", "tl.sum(x) / n + tl.load(x_ptr)"),
    "an extra barrier": ("    mean =", "    tl.debug_barrier()\n    mean ="),
    "moved and commented": ("@triton.jit\ndef centre", "# a comment\n\n\n@triton.jit\ndef centre"),
    "a function that it calls": ("x * 2.0", "tl.exp(x)"),
}


def load(path: Path, source: str):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def binaries_kept(tmp_path_factory):
    """Return the folder of the compiler's cache that the tests share."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def built(tmp_path, monkeypatch, binaries_kept):
    """Return a maker of what a check keeps of the kernel, with a change or none."""
    from triton import knobs

    monkeypatch.setattr(knobs.compilation, "disable_line_info", True)
    counted = iter(range(100))

    def build(change=None, *, anew=False):
        folder = tmp_path / "triton" if anew else binaries_kept
        monkeypatch.setattr(knobs.cache, "dir", str(folder))
        old, new = CHANGES.get(change, ("", ""))
        assert old in KERNEL
        folder = tmp_path / str(next(counted))
        folder.mkdir()
        module = load(folder / "kernel.py", KERNEL.replace(old, new))
        entry = SimpleNamespace(
            name="centre",
            call=lambda draw: module.run(draw(1 << 20), draw(1 << 20)),
            architectures=(ARCHITECTURE,),
        )
        (kernel,) = static_child._asked([entry], [])
        launch = kernel.pop("launch")
        return kernel | Binary.of(launch.compile()).to_dict()

    return build


def judged(base, head):
    return {p.metric: p for p in static_check.judge([base], [head])}


def test_a_rebuild_from_another_folder_is_the_same(built):
    first, again = built(), built(anew=True)
    assert first["digest"] == again["digest"]
    assert {m: p.verdict for m, p in judged(first, again).items()} == {
        static_check.CODE: Verdict.SAME
    }
    moved = built("moved and commented")
    assert moved["digest"] == first["digest"]


@pytest.mark.parametrize(
    ("change", "metrics"),
    [
        ("a larger block", {"stack_bytes", "spill_accesses", "registers"}),
        ("an added load", {"global_loads"}),
        ("an extra barrier", {"barriers"}),
    ],
)
def test_a_planted_fault_is_caught_and_named(built, change, metrics):
    points = judged(built(), built(change))
    regressed = {m for m, p in points.items() if p.verdict is Verdict.REGRESSED}
    assert metrics <= regressed
    assert all(p.notes for p in points.values())
    if change == "a larger block":
        assert "configuration: BLOCK 1024 -> 16384" in points["stack_bytes"].notes


def test_the_other_way_round_is_an_improvement(built):
    points = judged(built("an added load"), built())
    assert points["global_loads"].verdict is Verdict.IMPROVED


def test_a_change_in_a_function_that_is_called_is_a_change_of_source(built):
    base, head = built(), built("a function that it calls")
    assert base["source"] != head["source"]
    assert base["key"] != head["key"]
    (point, *_) = static_check.judge([base], [head])
    assert any("source" in note for note in point.notes)


# --- figures alone -------------------------------------------------------------------------------

FIGURES = {
    "entry": "e", "kernel": "k", "number": 1, "architecture": 90, "key": "0", "source": "s",
    "configuration": {"BLOCK": "64"}, "registers": 60, "stack_bytes": 0, "shared_bytes": 1024,
    "instructions": 1000, "global_loads": 8, "global_stores": 4, "shared_accesses": 40,
    "spill_accesses": 0, "barriers": 2, "digest": "a", "opcodes": {"LDG.E": 8},
}  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "value", "verdict"),
    [
        ("registers", 64, Verdict.SAME),  # allocated in eights
        ("registers", 65, Verdict.REGRESSED),
        ("registers", 56, Verdict.IMPROVED),
        ("shared_bytes", 1152, Verdict.SAME),
        ("shared_bytes", 1153, Verdict.REGRESSED),
        ("instructions", 1038, Verdict.SAME),
        ("instructions", 1039, Verdict.REGRESSED),
        ("stack_bytes", 8, Verdict.REGRESSED),
        ("global_stores", 5, Verdict.REGRESSED),
        ("shared_accesses", 44, Verdict.SAME),
    ],
)
def test_tolerances(metric, value, verdict):
    points = judged(FIGURES, {**FIGURES, metric: value, "digest": "b"})
    kept = points.get(metric, points.get(static_check.CODE))
    assert kept.verdict is verdict


def test_kernels_that_appear_vanish_or_fail_are_named():
    other = {**FIGURES, "kernel": "other"}
    broken = {**FIGURES, "error": "CompilationError: no"}
    verdicts = [p.verdict for p in static_check.judge([FIGURES], [other])]
    assert sorted(verdicts) == sorted([Verdict.NEW, Verdict.MISSING])
    assert [p.verdict for p in static_check.judge([FIGURES], [broken])] == [Verdict.FAILED]
    assert [p.verdict for p in static_check.judge([broken], [FIGURES])] == [Verdict.NEW]


def report_of(base, head):
    made = {"triton": "3", "compiled": 1, "cached": 2}
    request = static_check.Request(wanted=Wanted(repository=ROOT, base="main"))
    return static_check._report(
        {**made, "kernels": base}, {**made, "kernels": head}, {"base": "main"}, request
    )


def test_exit_codes():
    assert report_of([FIGURES], [FIGURES]).exit_code == 0
    assert report_of([FIGURES], [{**FIGURES, "barriers": 3}]).exit_code == 1
    two = [FIGURES, {**FIGURES, "kernel": "other"}]
    assert report_of(two, [FIGURES]).exit_code == 4  # one is missing
    assert report_of([], [FIGURES]).exit_code == 4  # nothing to compare
    assert report_of([], []).exit_code == 4


def test_it_says_how_many_were_compiled_and_how_many_cached():
    from mambench.harness.check import report as check_report

    text = check_report.text(report_of([FIGURES], [FIGURES]))
    assert "Compiled 1 kernels of the head and 1 of the base; 2 and 2 came from the cache." in text


# --- the cache -----------------------------------------------------------------------------------


def test_unchanged_kernels_come_from_the_cache(tmp_path, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", knobs.cache.dir)
    figures = {k: v for k, v in FIGURES.items() if k in Binary.__dataclass_fields__}
    compiled = []

    def compile_all(tasks):
        compiled.append(len(tasks))
        return [(key, figures) for key in tasks]

    monkeypatch.setattr(static_child, "_compile_all", compile_all)
    source = KERNEL

    def run():
        module = load(tmp_path / "kernel.py", source)
        entry = SimpleNamespace(
            name="centre",
            call=lambda draw: module.run(draw(1 << 20), draw(1 << 20)),
            architectures=(80, 90),
        )
        return static_child.compiled([entry], [], tmp_path / "cache", tmp_path)

    first = run()
    again = run()
    source = KERNEL.replace("x * 2.0", "x * 3.0")
    changed = run()
    assert compiled == [2, 0, 2]
    assert [(r["compiled"], r["cached"]) for r in (first, again, changed)] == [
        (2, 0), (0, 2), (2, 0),
    ]  # fmt: skip
    for file in (tmp_path / "cache").iterdir():
        file.write_text("{")  # torn
    source = KERNEL
    assert run()["compiled"] == 2


def test_an_entry_that_raises_is_a_failure_of_its_own(tmp_path):
    def call(draw):
        raise ValueError("sizes do not fit")

    bad = SimpleNamespace(name="bad", call=call, architectures=(90,))
    (found,) = static_child._asked([bad], [])
    assert "sizes do not fit" in found["error"]


def test_what_the_other_side_launches_alike_needs_no_binary(tmp_path, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", knobs.cache.dir)
    figures = {k: v for k, v in FIGURES.items() if k in Binary.__dataclass_fields__}
    monkeypatch.setattr(
        static_child, "_compile_all", lambda tasks: [(key, figures) for key in tasks]
    )
    module = load(tmp_path / "kernel.py", KERNEL)
    entry = SimpleNamespace(
        name="centre",
        call=lambda draw: module.run(draw(1 << 20), draw(1 << 20)),
        architectures=(80, 90),
    )
    first, second = [static_child.launched(kernel) for kernel in static_child._asked([entry], [])]
    second[2] += 1  # the same binary, under another number: it is compared with another there
    found = static_child.compiled([entry], [], None, tmp_path, [first, second])
    assert ["digest" in kernel for kernel in found["kernels"]] == [False, True]
    points = list(static_check.judge(found["kernels"], found["kernels"]))
    assert [p.verdict for p in points] == [Verdict.SAME, Verdict.SAME]
    assert points[0].reason == static_check.ALIKE
    other = {**found["kernels"][0], "key": "another"}  # not alike, and not compiled
    (point,) = static_check.judge(found["kernels"][:1], [other])
    assert point.verdict is Verdict.FAILED


# --- reading and asking --------------------------------------------------------------------------


def test_a_baseline_that_is_not_one_is_refused(tmp_path):
    path = tmp_path / "static.json"
    with pytest.raises(UsageError, match="cannot be read"):
        static_check.read(path)
    path.write_text("[")
    with pytest.raises(UsageError, match="not JSON"):
        static_check.read(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="holds no kernels"):
        static_check.read(path)
    path.write_text('{"kernels": [], "schema": 7}')
    with pytest.raises(MeasurementError, match="schema 7"):
        static_check.read(path)


def test_a_stored_baseline_is_cut_to_what_was_asked_for(tmp_path):
    kernels = [
        {"entry": entry, "architecture": architecture, "kernel": "k", "number": 1}
        for entry in ("ssd bf16", "scan bf16")
        for architecture in (80, 90)
    ]
    wanted = Wanted(repository=tmp_path, base="worktree")

    def kept(**asked):
        request = static_check.Request(wanted=wanted, **asked)
        found = static_check._asked({"schema": 1, "kernels": kernels}, request)["kernels"]
        return [(kernel["entry"], kernel["architecture"]) for kernel in found]

    assert len(kept()) == 4
    assert kept(architectures=(90,), entries="ssd") == [("ssd bf16", 90)]


USAGE = "Function centre:\n  REG:40 STACK:16 SHARED:0 LOCAL:0"
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
                                                            /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;  /* 0x0000000402048981 */
        /*0020*/                   ATOMS.ADD R1, [R2], R3 ; /* 0x1 */
        /*0030*/                   STL [R1], R4 ;           /* 0x2 */
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ; /* 0x3 */
        /*0050*/              @UP0 UTMALDG.2D [UR8], [UR4] ; /* 0x4 */
        /*0060*/                   RED.E.ADD [R2], R3 ;     /* 0x5 */
        /*0070*/                   EXIT ;                   /* 0x6 */
        /*0080*/                   NOP ;                    /* 0x7 */
"""


def test_disassembly_is_counted():
    found = Binary.parse(USAGE, SASS, shared_bytes=64)
    assert (found.registers, found.stack_bytes, found.shared_bytes) == (40, 16, 64)
    assert found.instructions == 8
    assert (found.global_loads, found.global_stores, found.shared_accesses) == (2, 1, 1)
    assert (found.spill_accesses, found.barriers) == (1, 1)
    with pytest.raises(MeasurementError, match="said nothing"):
        Binary.parse("", "", shared_bytes=0)


def test_every_entry_of_ours_launches_something():
    from mambench.kernels.inventory import ENTRIES

    launched = {
        (entry.name, architecture): [launch.name for launch in record(entry.call, architecture)]
        for entry in ENTRIES
        for architecture in entry.architectures
    }
    assert all(launched.values())
    again = {entry.name: entry for entry in ENTRIES}["s6 hopper serial bf16 N=16"]
    assert [launch.name for launch in record(again.call, 90)] == ["serial_scan_kernel"]
    assert {"scan_forward", "scan_backward"} <= set(launched["s6 triton bf16 N=16", 120])
    assert "grad_b_kernel" in launched["ssd triton bf16 P=64 N=128", 80]
    assert launched["s6 hopper serial bf16 N=16", 90] == ["serial_scan_kernel"]


# --- a repository of a user ----------------------------------------------------------------------

INVENTORY = """
from types import SimpleNamespace

import kernel

ENTRIES = [
    SimpleNamespace(
        name="centre",
        call=lambda draw: kernel.run(draw(1 << 20), draw(1 << 20)),
        architectures=(80,),
    )
]
"""


def judge_a_barrier(tmp_path, inventory, *options):
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "kernel.py").write_text(KERNEL)
    (repository / "still.py").write_text(KERNEL.replace("x * 2.0", "x * 3.0"))
    (repository / "inventory.py").write_text(inventory)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "One"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    old, new = CHANGES["an extra barrier"]
    (repository / "kernel.py").write_text(KERNEL.replace(old, new))
    return subprocess.run(
        [
            *(sys.executable, str(ROOT / "run_bench.py"), "check", "--static", "--base", "HEAD"),
            *("--inventory", "inventory.py", "--static-cache", str(tmp_path / "cache")),
            *("-o", str(tmp_path / "out"), *options),
        ],
        cwd=repository,
        capture_output=True,
        text=True,
    )


TWO = INVENTORY.replace("import kernel", "import kernel, still").replace(
    "ENTRIES = [",
    """ENTRIES = [
    SimpleNamespace(
        name="still",
        call=lambda draw: still.run(draw(1 << 20), draw(1 << 20)),
        architectures=(80,),
    ),""",
)


def test_only_what_changed_is_compiled_where_that_is_asked_for(tmp_path):
    done = judge_a_barrier(tmp_path, TWO, "--changed")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "REGRESSED  centre / centre sm_80 [barriers]" in done.stdout
    assert "Compiled 1 kernels of the head and 1 of the base; 0 and 0" in done.stdout
    assert "1 are launched alike on both sides" in done.stdout
    assert not (tmp_path / "out" / "static.json").exists()
