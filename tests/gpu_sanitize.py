"""Run every kernel on small shapes under NVIDIA's compute-sanitizer and say what it found.

`python tests/gpu_sanitize.py` needs a GPU and compute-sanitizer (of the CUDA toolkit) on the PATH.
Each part of `PARTS` runs by itself first, so that its kernels are compiled, then under every tool,
several at once, each with a time limit; a summary comes last. The exit status is 1 if a tool found
something or a part failed, 2 if nothing could be run.

memcheck finds accesses out of bounds and misaligned ones: memory is not cached, so that what lies
beyond a tensor belongs to nothing. racecheck finds hazards in shared memory.
"""

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit status of compute-sanitizer when it found something
LINES = 12  # of a report that are shown


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one part under one tool (None: by itself) came to."""

    part: str
    tool: str | None
    status: str  # ok, found, failed, timeout or skipped
    seconds: float
    text: str

    @property
    def good(self) -> bool:
        """Whether nothing speaks against the part."""
        return self.status in ("ok", "skipped")


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
}
HOPPER = "hopper"


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
    PARTS[part]()
    return 0


def run(part: str, tool: str | None, limit_s: float) -> Result:
    """Run a part in a process of its own and classify how it ended."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", part]
    if tool is not None:
        extra = ("--error-exitcode", str(FOUND), "--print-limit", "5")
        command = ["compute-sanitizer", "--tool", tool, *extra, *command]
    environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY"}
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
    return Result(part=part, tool=tool, status=status, seconds=seconds, text=text)


def show(results: list[Result]) -> None:
    """Print what is wrong at length, then a line for each part and tool."""
    for result in results:
        if not result.good:
            print(f"--- {result.part}, {result.tool or 'by itself'}: {result.status}")
            print("\n".join(result.text.strip().splitlines()[:LINES]))
    for result in results:
        tool = result.tool or "by itself"
        print(f"{result.status:8s} {tool:10s} {result.part:24s} {result.seconds:6.1f} s")


def main() -> int:
    """Run what is asked for and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="only these")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="only these")
    parser.add_argument("--jobs", type=int, default=4, help="processes at once (default 4)")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds for one (default 100)")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
        return 2
    with ThreadPoolExecutor(options.jobs) as pool:
        parts = options.part or list(PARTS)
        alone = list(pool.map(lambda part: run(part, None, options.limit), parts))
        able = [result.part for result in alone if result.status == "ok"]
        tasks = [(part, tool) for tool in options.tool or TOOLS for part in able]
        checked = list(pool.map(lambda task: run(*task, options.limit), tasks))
    show(alone + checked)
    return 0 if checked and all(result.good for result in alone + checked) else 1


if __name__ == "__main__":
    sys.exit(main())
