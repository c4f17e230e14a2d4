"""Run every kernel on small shapes under NVIDIA's compute-sanitizer and say what it found.

`python tests/gpu_sanitize.py` needs a GPU and compute-sanitizer (of the CUDA toolkit) on the PATH.
Each part of `PARTS` (`sanitized_parts.py`) runs by itself first, so that its kernels are compiled,
then under every tool, several at once, each with a time limit. What comes of it is told on the
standard error at once, a summary comes last. The exit status is 1 if a tool found something or a
part failed, 2 if nothing could be run.

memcheck finds accesses out of bounds and misaligned ones: memory is not cached and padded, so that
what lies behind a tensor is no other one. racecheck finds hazards in shared memory, synccheck
barriers that are used wrongly, initcheck global memory that is read before it was written. Each
must find what is planted for it, and under each a part must compute the bits that it computes by
itself: a tool slows some warps down far more than others, and a wait that is missing may show.
(Not under initcheck: before 2025.4 it does not know what bulk copies write, and takes a copy of
that to the host for one of unwritten memory.)

One kind of report of racecheck is excused. It takes the barriers that a warp has passed for its
time: if a warp has passed more of them, also such that are only for its group, what it writes is
reported when others read it, though a barrier of all lies between ("in order: ..."; details in
docs/experiments.md). Where `warp_specialize` begins, the compiler hands each warp a byte in shared
memory that says which partition it is. So a report is not counted if

- at every access the machine code is such a read (of a byte, right behind the barrier of the whole
  block, `bar.sync 1`) or write (right before it), and the kernel has barriers of a group;
- racecheck, in the same run, reports "in order: ..." and notices the partitions that do not wait.

It takes an arrival at an mbarrier to release the arriving thread's writes alone, where ours are a
partition's barrier and one thread's arrival. Kernels that hand on data so are compiled for it with
every thread arriving (`all_arriving`), and a wait that is left out must be noticed there.
"""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 86  # exit status of compute-sanitizer when it found something
_JOBS = max(4, min(18, (os.cpu_count() or 4) - 2))  # processes at once, unless told
PADDING = 1 << 16  # bytes behind every allocation, which memcheck knows to be nobody's
LINES = 12  # of a report that are shown
# One report of racecheck: "Error: Race reported between Read access at kernel+0x190 in ..."
_REPORT = re.compile(r"(?:Error|Warning): Race reported between .*?(?=\n=+ *\n|\Z)", re.S)
_ACCESS = re.compile(r"(Read|Write) access at (\w+)(?:\([^)]*\))?\+(0x[0-9a-f]+)")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
_GROUP_BARRIER = re.compile(r"BAR\.SYNC\S* 0x\w+, 0x\w+$")  # of a number of threads
_BLOCK_BARRIER = re.compile(r"BAR\.SYNC\S* 0x1$")  # all threads: no number of them behind
_NEAR = 12  # instructions between the barrier and the byte
# What may not lie between: memory accesses, synchronisation and jumps.
_ORDERED = ("LD", "ST", "ATOM", "RED", "UTMA", "UBLKCP", "SYNCS", "BAR", "BR", "CALL", "EXIT")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one part under one tool (None: by itself) came to."""

    part: str
    tool: str | None
    status: str  # ok, found, excused, other bits, failed, timeout or skipped; noticed or missed
    # (if planted); mistaken (if in order)
    seconds: float
    text: str
    excusable: bool = False  # all that racecheck reported is the hand-over's

    @property
    def good(self) -> bool:
        """Whether nothing speaks against the part."""
        return self.status in ("ok", "excused", "noticed", "mistaken", "skipped")

    @property
    def digest(self) -> str | None:
        """A hash of what the part computed."""
        found = re.search(r"^digest (\w+)$", self.text, re.M)
        return found and found[1]


def parts() -> ModuleType:
    """Import what is run, from the file beside this one."""
    spec = spec_from_file_location("sanitized_parts", ROOT / "tests" / "sanitized_parts.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_RUN = parts()
PARTS: dict[str, Callable[[], object]] = _RUN.PARTS
PLANTED: dict[str, tuple[str, Callable[[], object]]] = _RUN.PLANTED
IN_ORDER: dict[str, Callable[[], object]] = _RUN.IN_ORDER
CALLS = PARTS | IN_ORDER | {name: call for name, (_, call) in PLANTED.items()}


def child(part: str, *, copy: bool) -> int:
    """Run one part in this process, and say what it computed if that may be copied."""
    package = ROOT / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    import torch

    if _RUN.HOPPER in part and torch.cuda.get_device_capability() != (9, 0):
        print("needs compute capability 9.0")
        return FOUND + 1
    torch.manual_seed(0)
    computed = CALLS[part]()
    torch.cuda.synchronize()
    if copy:
        print("digest", _RUN.digest(computed))
    return 0


def disassembled(folder: Path, name: str) -> list[dict[int, str]]:
    """Return a kernel's machine codes in a folder of Triton's, each as {address: text}."""
    return [_code(cubin) for cubin in sorted(folder.rglob(f"{name}.cubin"))]


@lru_cache(maxsize=256)
def _code(cubin: Path) -> dict[int, str]:
    from triton import knobs

    tool = knobs.nvidia.nvdisasm.path
    done = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True)
    return {int(m[1], 16): (m[2] + m[3]).strip() for m in _INSTRUCTION.finditer(done.stdout)}


def is_hand_over(report: str, folder: Path) -> bool:
    """Whether every access of a report is one of the hand-over to partitions, by machine code."""
    accesses = _ACCESS.findall(report)
    names = {name for _, name, _ in accesses}
    if len(names) != 1 or {kind for kind, _, _ in accesses} != {"Read", "Write"}:
        return False
    return any(
        all(_hands_over(kind, int(at, 16), code) for kind, _, at in accesses)
        and any(_GROUP_BARRIER.match(text) for text in code.values())
        for code in disassembled(folder, names.pop())
    )


def _hands_over(kind: str, at: int, code: dict[int, str]) -> bool:
    """Whether nothing but arithmetic lies between the access at an address and the barrier."""
    if not code.get(at, "").startswith("LDS.U8 " if kind == "Read" else "STS"):
        return False
    addresses = sorted(code)
    place = addresses.index(at)
    before, behind = addresses[:place][: -_NEAR - 1 : -1], addresses[place + 1 :][:_NEAR]
    for text in (code[address] for address in (before if kind == "Read" else behind)):
        if _BLOCK_BARRIER.match(text):
            return True
        if kind == "Write" and text.startswith("STS"):
            continue  # the bytes of many warps are more than one instruction writes
        if text.startswith(_ORDERED) and not text.startswith("LDC"):
            return False
    return False


def is_excusable(text: str, folder: Path) -> bool:
    """Whether racecheck reported the hand-over, nothing else, and everything is shown."""
    reports = _REPORT.findall(text)
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazard", text)
    if not reports or summary is None or int(summary[1]) != len(reports):
        return False  # some are not shown, or are no races
    return all(is_hand_over(report, folder) for report in reports)


def _kernels() -> Path:
    """Return where this process's parts keep what they compile."""
    return Path(tempfile.gettempdir()) / f"mambench-sanitize-{os.getpid()}"


def run(part: str, tool: str | None, limit_s: float) -> Result:
    """Run a part in a process of its own and say how it ended."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", part]
    if tool == "initcheck":
        command.append("--no-copy")
    if tool is not None:
        extra = ("--error-exitcode", str(FOUND), "--print-limit", "40")
        if tool == "memcheck":
            extra += ("--padding", str(PADDING))
        command = ["compute-sanitizer", "--tool", tool, *extra, *command]
    kernels = _kernels() / re.sub(r"\W+", "-", part)
    environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY", "TRITON_CACHE_DIR": str(kernels)}
    if tool in ("memcheck", "initcheck"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
        status = {0: "ok", FOUND: "found", FOUND + 1: "skipped"}.get(done.returncode, "failed")
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status = "timeout"
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else ""
    seconds = time.monotonic() - began
    excusable = tool == "racecheck" and status == "found" and is_excusable(text, kernels)
    if tool is not None and part in PLANTED:
        status = {"found": "noticed", "ok": "missed"}.get(status, status)
    elif tool == "racecheck" and part in IN_ORDER and status == "found":
        status = "mistaken"
    print(f"{status} {tool or 'by itself'} {part} {seconds:.1f} s", file=sys.stderr, flush=True)
    return Result(
        part=part, tool=tool, status=status, seconds=seconds, text=text, excusable=excusable
    )


def judge(alone: list[Result], checked: list[Result]) -> list[Result]:
    """Return what the tools found, with what is excused, and results that are not the same bits."""
    computed = {result.part: result.digest for result in alone}
    race = [result for result in checked if result.tool == "racecheck"]
    able = any(r.status == "mistaken" for r in race) and all(
        r.status == "noticed" and not r.excusable for r in race if r.part in PLANTED
    )
    judged = []
    for result in checked:
        status = result.status
        if status == "found" and able and result.excusable:
            status = "excused"
        other = result.digest not in (None, computed[result.part])
        if status in ("ok", "excused") and other:
            status = "other bits"
        judged.append(replace(result, status=status))
    return judged


def show(results: list[Result]) -> None:
    """Print what is wrong at length, then a line for each part and tool."""
    for result in results:
        if not result.good:
            print(f"--- {result.part}, {result.tool or 'by itself'}: {result.status}")
            print("\n".join(result.text.strip().splitlines()[:LINES]))
    for result in results:
        tool = result.tool or "by itself"
        print(f"{result.status:10s} {tool:10s} {result.part:46s} {result.seconds:6.1f} s")


def _begin(
    pool: ThreadPoolExecutor, part: str, tools: tuple[str, ...], limit_s: float
) -> tuple[Result, list[Future[Result]]]:
    """Run a part by itself, so that its kernels are compiled, and have it run under the tools."""
    alone = run(part, None, limit_s)
    asked = tools if alone.status == "ok" else ()
    return alone, [pool.submit(run, part, tool, limit_s) for tool in asked]


def main() -> int:
    """Run what is asked for and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="only these")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="only these")
    parser.add_argument("--jobs", type=int, default=_JOBS, help=f"at once (default {_JOBS})")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds for one (default 100)")
    parser.add_argument("--child", choices=CALLS, help=argparse.SUPPRESS)
    parser.add_argument("--no-copy", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child, copy=not options.no_copy)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
        return 2
    tools = options.tool or TOOLS
    tasks = dict.fromkeys(options.part or PARTS, tools)
    others = tuple(tool for tool in tools if tool != "racecheck")
    tasks |= dict.fromkeys(_RUN.ONE_ARRIVES & tasks.keys(), others)
    tasks |= {part: ("racecheck",) for part in IN_ORDER if "racecheck" in tools}
    tasks |= {part: (tool,) for part, (tool, _) in PLANTED.items() if tool in tools}
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            begun = [pool.submit(_begin, pool, *task, options.limit) for task in tasks.items()]
            done = [future.result() for future in begun]
            alone = [result for result, _ in done]
            checked = [future.result() for _, more in done for future in more]
        checked = judge(alone, checked)
    finally:
        shutil.rmtree(_kernels(), ignore_errors=True)
    show(alone + checked)
    return 0 if checked and all(result.good for result in alone + checked) else 1


if __name__ == "__main__":
    sys.exit(main())
