"""Times of known kernels by NVIDIA's nvbench, in a process of its own: it owns its process' device.

Run by the selftest as `_start.py harness.selftest.nvbench DEVICE_INDEX FILE SCALE`. Imports torch
and cuda.bench only then. The kernels' lengths come from the selftest: found anew in this process,
they would be other kernels.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mambench
from mambench.harness.spec import Device

if TYPE_CHECKING:
    from mambench.harness.selftest.gpu_timers import Scale

LIMIT_S = 90.0
BENCHMARK_LIMIT_S = "4"  # else it samples a short wait for 15 s to see its noise settle
INSTALL = "pip install 'cuda-bench[cu13]'"
MEAN = "nv/cold/time/gpu/mean"


def times_s(device: Device, scale: "Scale") -> tuple[dict[str, float], str | None]:
    """Return the mean times of `gpu_timers.steady_kernels` by name, or why there are none."""
    if not _installed():
        return {}, f"cuda-bench is not installed: {INSTALL}"
    start = Path(mambench.__file__).with_name("_start.py")
    with tempfile.TemporaryDirectory(prefix="mambench-nvbench-") as folder:
        file = Path(folder) / "times.json"
        command = [sys.executable, "-P", str(start), "harness.selftest.nvbench"]
        try:
            done = subprocess.run(
                [*command, str(device.index), str(file), json.dumps(asdict(scale))],
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"nvbench did not end within {LIMIT_S:g} s") from None
        if done.returncode or not file.is_file():
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise RuntimeError(f"nvbench ended with status {done.returncode}: {' '.join(last)}")
        return parse(file.read_text()), None


def parse(text: str) -> dict[str, float]:
    """Return the mean GPU time by benchmark from nvbench's JSON; what was skipped is left out."""
    found: dict[str, float] = {}
    for benchmark in json.loads(text)["benchmarks"]:
        for state in benchmark["states"]:
            for summary in state.get("summaries") or ():
                if summary["tag"] == MEAN:
                    values = {entry["name"]: entry["value"] for entry in summary["data"]}
                    found[benchmark["name"]] = float(values["value"])
    return found


def main(arguments: list[str]) -> None:
    """Register the kernels with nvbench, run them on one device and write its JSON."""
    import torch

    bench: Any = importlib.import_module("cuda.bench")
    from mambench.harness.selftest.gpu_timers import Scale, steady_kernels

    index, file, scale = arguments
    torch.cuda.set_device(int(index))
    for name, execute in steady_kernels(Scale(**json.loads(scale))).items():
        bench.register(_benchmark(name, execute)).set_name(name)
    torch.cuda.synchronize()
    options = ["--devices", index, "--timeout", BENCHMARK_LIMIT_S, "--json", file]
    bench.run_all_benchmarks([sys.argv[0], *options])


def _benchmark(name: str, execute: Callable[[], None]) -> Callable[[Any], None]:
    import torch

    def launch(launched: Any) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(launched.get_stream().addressof())):
            execute()

    def benchmark(state: Any) -> None:
        state.exec(launch, batched=False)

    benchmark.__name__ = name
    return benchmark


def _installed() -> bool:
    try:
        return importlib.util.find_spec("cuda.bench") is not None
    except ModuleNotFoundError:  # there is no package `cuda` at all
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
