"""Judge the SSD backward's Hopper kernels on the CPU, as `hopper_cases` judges the forward's.

`hopper_grad_cases.py '[{"case": {...}}, ...]'` prints the errors of every case's gradients as JSON,
with how often each Gluon kernel was launched. A case may say for how many multiprocessors heads are
divided, and that x is one element "off" where TMA can read.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import hopper_cases  # sets TRITON_INTERPRET
import torch

machine, ssd_cases = hopper_cases.machine, hopper_cases.cases
KERNELS = ("exits_kernel", "grad_c_fetched_kernel", "grad_kernel", "states_kernel")


def load():
    """Import the launches with Gluon stood in for; returns them and the kernels' modules."""
    hopper_cases.load()
    with machine.installed():
        from mambench.kernels.ssd import (
            hopper_exits_kernel,
            hopper_grad,
            hopper_grad_c_kernel,
            hopper_grad_kernel,
            hopper_states_kernel,
        )
    modules = (
        hopper_exits_kernel, hopper_grad_c_kernel, hopper_grad_kernel, hopper_states_kernel
    )  # fmt: skip
    launched(hopper_grad, modules)
    return hopper_grad, modules


def launched(launches, modules):
    """Have the launches take the kernels as they are now."""
    for name, module in zip(KERNELS, modules, strict=True):
        setattr(launches, name, machine.Launcher(getattr(module, name)))


def errors(launches, case):
    """Return the gradients' relative errors against float64 autograd of the loop."""
    from mambench.kernels.ssd import triton_launch, triton_ssd_backward
    from mambench.kernels.ssd.triton_ssd import ssd

    case = {"dtype": "float16", "gated": False} | case
    processors = case.pop("multiprocessors", 1)
    off = case.pop("off", False)
    pinned = triton_launch.tiling

    def tiling(*sizes, wgmma):
        return replace(pinned(*sizes, wgmma=True), fetched=True)  # as `hopper_ssd` plans

    def op(x, **rest):
        return ssd(shifted(x) if off else x, **rest)

    before = [getattr(launches, name).launches for name in KERNELS]
    with (
        mock.patch.object(triton_launch, "tiling", tiling),
        mock.patch.object(launches, "multiprocessors", return_value=processors),
        mock.patch.object(triton_ssd_backward, "multiprocessors", return_value=processors),
    ):
        found = ssd_cases.errors(op, case, segments=case.pop("segments", 2))
    after = [getattr(launches, name).launches for name in KERNELS]
    return found | {"launches": [b - a for a, b in zip(before, after, strict=True)]}


def shifted(x):
    """Return x with its first element at no multiple of 16 bytes."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return torch.as_strided(memory, x.shape, x.contiguous().stride()).copy_(x)


def judged(launches, modules, job):
    """Return a case's errors, or what it raised where a fault is planted."""
    if "changes" not in job:
        return errors(launches, job["case"])
    right = [Path(module.__file__).read_text() for module in modules]
    wrong = list(right)
    for old, new in job["changes"]:
        found = [i for i, text in enumerate(wrong) if old in text]
        if not found:
            raise ValueError(f"not in the sources: {old}")
        wrong[found[-1]] = wrong[found[-1]].replace(old, new)
    try:
        run(launches, modules, wrong)
        return errors(launches, job["case"])
    except (RuntimeError, IndexError, TypeError) as raised:  # what the machine says of a kernel
        return {"raised": repr(raised)}
    finally:
        run(launches, modules, right)


def run(launches, modules, sources):
    """Execute the kernels' sources in their modules."""
    with machine.installed():
        for module, source in zip(modules, sources, strict=True):
            exec(compile(source, module.__file__, "exec"), module.__dict__)
    launched(launches, modules)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    launches, modules = load()
    print(json.dumps([judged(launches, modules, job) for job in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
