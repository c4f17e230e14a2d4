"""Run every kernel on small shapes under NVIDIA's compute-sanitizer and say what it found.

`python tests/gpu_sanitize.py` needs a GPU and compute-sanitizer (of the CUDA toolkit) on the PATH.
Each part of `PARTS` runs by itself first, so that its kernels are compiled, then under every tool,
several at once, each with a time limit; a summary comes last. The exit status is 1 if a tool found
something or a part failed, 2 if nothing could be run.

memcheck finds accesses out of bounds and misaligned ones: memory is not cached, so that what lies
beyond a tensor belongs to nothing. racecheck finds hazards in shared memory, and must find those of
`PLANTED` (tests/faults/races.py).

One kind of report is excused. Before a partition of `warp_specialize` begins, the compiler hands
each of its warps a byte in shared memory that says which one it is; writing and reading lie on the
two sides of a barrier of the whole block (`bar.sync 1`), and the next writing is behind another.
racecheck has reported them all the same; "hand-over, hopper" is a kernel that has nothing else in
shared memory. So a report is not counted if the machine code at every access is such a read (of a
byte, right behind that barrier) or write (right before it); any other access in it, and it counts.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit status of compute-sanitizer when it found something
LINES = 12  # of a report that are shown
# One report of racecheck: "Error: Race reported between Read access at kernel+0x190 in ..."
_REPORT = re.compile(r"(?:Error|Warning): Race reported between .*?(?=\n=+ *\n|\Z)", re.S)
_ACCESS = re.compile(r"(Read|Write) access at (\w+)(?:\([^)]*\))?\+(0x[0-9a-f]+)")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
_BLOCK_BARRIER = re.compile(r"BAR\.SYNC\S* 0x1$")  # all threads: no number of them behind
_NEAR = 12  # instructions between the barrier and the byte
# What may not lie between: memory accesses, synchronisation and jumps.
_ORDERED = ("LD", "ST", "ATOM", "RED", "UTMA", "UBLKCP", "SYNCS", "BAR", "BR", "CALL", "EXIT")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one part under one tool (None: by itself) came to."""

    part: str
    tool: str | None
    status: str  # ok, found, excused, noticed or missed (if planted), failed, timeout or skipped
    seconds: float
    text: str

    @property
    def good(self) -> bool:
        """Whether nothing speaks against the part."""
        return self.status in ("ok", "excused", "noticed", "skipped")


def s6(module: str, d_state: int) -> None:
    """Run a selective scan with every option, forward and backward, at an odd size."""
    import torch

    batch, channels, seqlen, groups = 2, 34, 75, 2
    wide, shared = (batch, channels, seqlen), (batch, groups, d_state, seqlen)
    inputs = {
        "u": torch.randn(wide).bfloat16(), "delta": torch.randn(wide).bfloat16(),
        "A": -torch.rand(channels, d_state), "B": torch.randn(shared).bfloat16(),
        "C": torch.randn(shared).bfloat16(), "D": torch.randn(channels),
        "z": torch.randn(wide).bfloat16(), "delta_bias": torch.randn(channels),
    }  # fmt: skip
    scan = _operation(f"{module}.selective_scan")
    _both_passes(lambda **t: scan(**t, delta_softplus=True, return_last_state=True), inputs)


def ssd(operation: str, headdim: int, d_state: int, **options: int) -> None:
    """Run an SSD with every option, forward and backward, at an odd length in two segments."""
    import torch

    batch, seqlen, heads, groups = 2, 150, 6, 2
    wide, shared = (batch, seqlen, heads, headdim), (batch, seqlen, groups, d_state)
    inputs = {
        "x": torch.randn(wide).bfloat16(), "dt": torch.randn(batch, seqlen, heads).bfloat16(),
        "A": -torch.rand(heads), "B": torch.randn(shared).bfloat16(),
        "C": torch.randn(shared).bfloat16(), "D": torch.randn(heads),
        "z": torch.randn(wide).bfloat16(), "dt_bias": torch.randn(heads),
        "initial_states": torch.randn(batch, heads, headdim, d_state),
    }  # fmt: skip
    op = _operation(operation)
    given = {"chunk_size": 64, "dt_softplus": True, "return_final_states": True, **options}
    _both_passes(lambda **t: op(**t, **given), inputs)


def state_update() -> None:
    """Update states of both families by one token, with several tilings."""
    import torch

    from mambench.kernels.state_update.config import CONFIGS
    from mambench.kernels.state_update.triton_update import selective_state_update

    batch, heads, d_state = 3, 10, 20
    for headdim in (None, 24):
        places = (heads,) if headdim is None else (heads, headdim)
        x = torch.randn(batch, *places).bfloat16().cuda()
        dt = torch.randn(batch, heads).bfloat16().cuda()
        A = -torch.rand((heads, d_state) if headdim is None else (heads,)).cuda()
        B, C = (torch.randn(batch, 2, d_state).bfloat16().cuda() for _ in "BC")
        for config in CONFIGS[:: 1 if headdim is None else 4]:
            state = torch.randn(batch, *places, d_state).bfloat16().cuda()
            selective_state_update(state, x, dt, A, B, C, z=x, dt_softplus=True, config=config)
    torch.cuda.synchronize()


def around_mixers() -> None:
    """Run what blocks run around their mixers, forward and backward, at odd sizes."""
    import torch

    from mambench.kernels.conv.triton_conv import conv_backward, conv_forward
    from mambench.kernels.elementwise import triton_elementwise as elementwise
    from mambench.kernels.norm.triton_norm import norm_backward, norm_forward

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16().cuda()

    batch, channels, seqlen = 2, 70, 301
    weight, bias = normal(channels, 4), normal(channels)
    for last in (False, True):
        x = normal(batch, seqlen, channels).mT if last else normal(batch, channels, seqlen)
        dout = (x[:, :40], x[:, 40:55], x[:, 55:]) if last else (x,)
        conv_forward(x, weight, bias, True)
        conv_backward(x, weight, bias, dout, True, more=None if last else normal(*x.shape))
    for width in (20, 301, 2048):
        for z in (None, normal(37, width)):
            x, scale, dout = normal(37, width), normal(width), normal(37, width)
            _, rstd = norm_forward(x, scale, z, 1e-5)
            norm_backward(x, scale, z, rstd, dout, residual=x, give_out=True, overwrite=True)
    tables = normal(seqlen, 1, 1, 24), normal(seqlen, 1, 1, 24)
    elementwise.rotate_(normal(batch, seqlen, 3, 3, 24), *tables)
    elementwise.rotate_back(*(normal(batch, seqlen, 3, 24) for _ in "qkv"), *tables)
    elementwise.gated_product_backward(normal(37, 602), normal(37, 301))
    elementwise.gated_product(normal(37, 602))
    torch.cuda.synchronize()


PARTS: dict[str, Callable[[], None]] = {
    "s6 triton": lambda: s6("kernels.s6.triton_scan", 16),
    "s6 hopper": lambda: s6("kernels.s6.hopper_op", 20),
    "s6 hopper, 128 states": lambda: s6("kernels.s6.hopper_op", 128),
    "s6 associative": lambda: s6("kernels.scan_triton", 16),
    "ssd triton": lambda: ssd("kernels.ssd.triton_ssd.ssd", 40, 24, segments=2),
    "ssd hopper": lambda: ssd("kernels.ssd.hopper_op.ssd", 40, 24, segments=2),
    "ssd hopper, widest": lambda: ssd("kernels.ssd.hopper_op.ssd", 64, 128, segments=2),
    "ssd associative": lambda: ssd("kernels.scan_triton.state_space_dual", 8, 16),
    "state update": state_update,
    "around mixers": around_mixers,
    "hand-over, hopper": lambda: races().hand_over(),
}
HOPPER = "hopper"
# What racecheck must find, or it would find nothing elsewhere either.
PLANTED = {
    "planted: partitions that do not wait, hopper": lambda: races().unsynchronised(),
    "planted: lanes that round a sum differently": lambda: races().contracted_sum(),
}


def races() -> ModuleType:
    """Import the kernels with races, which are no part of the package."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("races", ROOT / "tests" / "faults" / "races.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _operation(path: str) -> Callable[..., object]:
    from importlib import import_module

    module, _, name = path.rpartition(".")
    return getattr(import_module(f"mambench.{module}"), name)


def _both_passes(op: Callable[..., object], inputs: dict[str, object]) -> None:
    import torch

    leaves = {name: t.cuda().requires_grad_() for name, t in inputs.items()}  # pyright: ignore
    outputs = op(**leaves)
    torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])  # pyright: ignore
    torch.cuda.synchronize()


def child(part: str) -> int:
    """Run one part in this process."""
    package = ROOT / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    import torch

    if HOPPER in part and torch.cuda.get_device_capability() != (9, 0):
        print("needs compute capability 9.0")
        return FOUND + 1
    torch.manual_seed(0)
    (PARTS | PLANTED)[part]()
    torch.cuda.synchronize()
    return 0


def disassembled(folder: Path) -> dict[str, list[dict[int, str]]]:
    """Return the kernels of a folder of Triton's: of each name, every code's {address: text}."""
    from triton import knobs

    tool, kernels = knobs.nvidia.nvdisasm.path, {}
    for cubin in folder.rglob("*.cubin"):
        done = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True)
        code = {int(m[1], 16): (m[2] + m[3]).strip() for m in _INSTRUCTION.finditer(done.stdout)}
        kernels.setdefault(cubin.stem, []).append(code)
    return kernels


def is_hand_over(report: str, kernels: dict[str, list[dict[int, str]]]) -> bool:
    """Whether every access of a report is one of the hand-over to partitions, by machine code."""
    accesses = _ACCESS.findall(report)
    names = {name for _, name, _ in accesses}
    if len(names) != 1 or {kind for kind, _, _ in accesses} != {"Read", "Write"}:
        return False
    return any(
        all(_hands_over(kind, int(at, 16), code) for kind, _, at in accesses)
        for code in kernels.get(names.pop(), ())
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


def uncounted(text: str, folder: Path) -> list[str] | None:
    """Return a run's reports if all are the hand-over's; None if there are others, or none."""
    reports = _REPORT.findall(text)
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazard", text)
    if not reports or summary is None or int(summary[1]) != len(reports):
        return None  # some are not shown, or are no races
    kernels = disassembled(folder)
    return reports if all(is_hand_over(report, kernels) for report in reports) else None


def _kernels() -> Path:
    """Return where this process's parts keep what they compile."""
    return Path(tempfile.gettempdir()) / f"mambench-sanitize-{os.getpid()}"


def run(part: str, tool: str | None, limit_s: float) -> Result:
    """Run a part in a process of its own and classify how it ended."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", part]
    if tool is not None:
        extra = ("--error-exitcode", str(FOUND), "--print-limit", "40")
        command = ["compute-sanitizer", "--tool", tool, *extra, *command]
    kernels = _kernels() / re.sub(r"\W+", "-", part)
    environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY", "TRITON_CACHE_DIR": str(kernels)}
    if tool == "memcheck":
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
    if tool == "racecheck" and part in PLANTED:
        status = {"found": "noticed", "ok": "missed"}.get(status, status)
    elif tool == "racecheck" and status == "found" and uncounted(text, kernels):
        status = "excused"
    return Result(part=part, tool=tool, status=status, seconds=seconds, text=text)


def show(results: list[Result]) -> None:
    """Print what is wrong at length, then a line for each part and tool."""
    for result in results:
        if not result.good:
            print(f"--- {result.part}, {result.tool or 'by itself'}: {result.status}")
            print("\n".join(result.text.strip().splitlines()[:LINES]))
    for result in results:
        tool = result.tool or "by itself"
        print(f"{result.status:8s} {tool:10s} {result.part:46s} {result.seconds:6.1f} s")


def main() -> int:
    """Run what is asked for and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS | PLANTED, action="append", help="only these")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="only these")
    parser.add_argument("--jobs", type=int, default=4, help="processes at once (default 4)")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds for one (default 100)")
    parser.add_argument("--child", choices=PARTS | PLANTED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
        return 2
    parts = options.part or list(PARTS | PLANTED)
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            alone = list(pool.map(lambda part: run(part, None, options.limit), parts))
            able = [result.part for result in alone if result.status == "ok"]
            tasks = [
                (part, tool)
                for tool in options.tool or TOOLS
                for part in able
                if tool == "racecheck" or part not in PLANTED
            ]
            checked = list(pool.map(lambda task: run(*task, options.limit), tasks))
    finally:
        shutil.rmtree(_kernels(), ignore_errors=True)
    show(alone + checked)
    return 0 if checked and all(result.good for result in alone + checked) else 1


if __name__ == "__main__":
    sys.exit(main())
