"""Run the Triton selective scan in Triton's interpreter and print as JSON what is wrong.

A process of its own, because Triton decides at decoration whether to interpret. Run as
`TRITON_INTERPRET=1 python ../quick_interpreter.py interpret_scan.py CASE ...`, a CASE being a key
of CASES.
"""

import contextlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import literal
import torch

HERE = Path(__file__).resolve()

WANTED_WARPS = 2048

# bfloat16 is left to the GPU: the interpreter truncates where hardware rounds.
CASES = {
    # more than one chunk and segment, padded states, two groups
    "segments": {"sizes": (1, 2, 66, 3, 2)},
    # one segment; several blocks of channels for a program of the backward, the last one ragged
    "columns": {"sizes": (1, 37, 5, 16, 1), "wanted_warps": 1},
    "float16": {"sizes": (2, 3, 6, 16, 1), "dtype": torch.float16},
    "bare": {"sizes": (1, 1, 1, 1, 1), "without": ("D", "z", "delta_bias")},
    "no-softplus": {"sizes": (1, 5, 6, 4, 1), "softplus": False},
    "wide": {"sizes": (1, 4, 6, 40, 1)},
    "started": {"sizes": (1, 2, 66, 3, 2), "started": True},
    "started-once": {"sizes": (2, 3, 6, 4, 1), "started": True, "wanted_warps": 1},
    # a planted fault: all segments start from zero, as if the states before had been forgotten
    "forgotten": {"sizes": (1, 1, 66, 3, 1), "forgotten": True},
}


def poison(original):
    """Fill what torch.empty returns with NaN, so that an element left unwritten shows."""

    def empty(*args, **kwargs):
        tensor = original(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

    return empty


def judge(case: dict) -> dict[str, str]:
    """Return what is wrong with a case, by result; nothing when it is right."""
    from mambench.kernels.s6 import triton_config, triton_scan

    triton_config._WANTED_WARPS = case.get("wanted_warps", WANTED_WARPS)
    softplus = case.get("softplus", True)
    inputs = literal.draw(
        *case["sizes"],
        dtype=case.get("dtype", torch.float32),
        without=case.get("without", ()),
        started=case.get("started", False),
    )
    if not softplus:
        with torch.no_grad():
            inputs["delta"].abs_().mul_(0.01)
            inputs["delta_bias"].abs_().mul_(0.01)

    def op(**arguments):
        return triton_scan.selective_scan(**arguments, return_last_state=True)

    with forgetting() if case.get("forgotten") else contextlib.nullcontext():
        results = literal.run(op, inputs, softplus=softplus)
    return literal.excesses(inputs, results, softplus=softplus)


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Start every segment from zero while the block runs."""
    from mambench.kernels.s6 import triton_scan

    combine = triton_scan._combine_segments

    def forget(recording, inputs, cut, end, total, start, *, reverse) -> None:
        combine(recording, inputs, cut, end, total, start, reverse=reverse)
        start.zero_()

    triton_scan._combine_segments = forget
    try:
        yield
    finally:
        triton_scan._combine_segments = combine


if __name__ == "__main__":
    package = HERE.parents[3] / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    torch.empty, torch.empty_like = poison(torch.empty), poison(torch.empty_like)
    torch.set_num_threads(1)
    print(json.dumps({name: judge(CASES[name]) for name in sys.argv[1:]}))
