"""Judge the Hopper SSD on the CPU: its Triton kernels interpreted, its Gluon kernels run by torch.

A process of its own, because TRITON_INTERPRET is read when a kernel is defined:
`hopper_cases.py '[{"case": {...}}, ...]'` prints the errors of every case as JSON. A case that has
"changes", [[old, new], ...], runs with the source of its Gluon kernels changed so, to plant a
fault; what that raises is printed in the errors' place.
"""

import contextlib
import importlib.util
import json
import math
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

ROOT = Path(__file__).resolve().parents[3]


def beside(name, path):
    """Load a script of the tests as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


machine = beside("gluon_machine", Path(__file__).parents[1] / "gluon_machine.py")
cases = beside("ssd_cases", Path(__file__).with_name("ssd_cases.py"))


def load():
    """Import the operation with Gluon stood in for."""
    package = ROOT / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    with machine.installed():
        from mambench.kernels.ssd import hopper_ssd as op
    op.multiprocessors = lambda device: 132
    launched(op)
    return op


def launched(op):
    """Have the operation launch the Gluon kernels as they are now."""
    from mambench.kernels.ssd import (
        hopper_fused,
        hopper_fused_kernel,
        hopper_kernel,
        hopper_walk,
        hopper_walk_kernel,
    )

    op.fused_kernel = hopper_fused.fused_kernel = machine.Launcher(hopper_fused_kernel.fused_kernel)
    op.walk_kernel = hopper_walk.walk_kernel = machine.Launcher(hopper_walk_kernel.walk_kernel)
    op.scan_kernel = machine.Launcher(hopper_kernel.scan_kernel)
    op.state_kernel = machine.Launcher(hopper_kernel.state_kernel)


@contextlib.contextmanager
def planted(op, changes, case):
    """Change the sources of the Gluon kernels that a case runs, while the block runs."""
    from mambench.kernels.ssd import (
        hopper_fused_kernel,
        hopper_kernel,
        hopper_look_back,
        hopper_walk_kernel,
        hopper_walk_producer,
    )

    modules = (hopper_kernel,)
    if case.get("fused"):
        modules = (hopper_look_back, hopper_fused_kernel)
    elif case.get("look_back"):
        modules = (hopper_look_back, hopper_walk_producer, hopper_walk_kernel)
    right = [Path(module.__file__).read_text() for module in modules]
    wrong = list(right)
    for old, new in changes:
        found = next((i for i, text in enumerate(wrong) if old in text), None)
        if found is None:
            raise ValueError(f"not in the sources: {old}")
        wrong[found] = wrong[found].replace(old, new)

    def run(sources):
        with machine.installed():
            for module, source in zip(modules, sources, strict=True):
                exec(compile(source, module.__file__, "exec"), module.__dict__)
        launched(op)

    run(wrong)
    try:
        yield
    finally:
        run(right)


def errors(op, case):
    """Return the relative errors of what the forward leaves, against the loop in float64."""
    case = dict(case)
    config = op.Config(
        pdl=False, segments=case.pop("segments"), scores=case.pop("scores", True),
        fused=case.pop("fused", False), look_back=case.pop("look_back", False),
    )  # fmt: skip
    limit = tuple(case.pop("dt_limit", (0.0, math.inf)))
    shared = {"dt_softplus": case.pop("dt_softplus", True), "dt_limit": limit}
    exact = cases.draw(**case)
    out, state = cases.loop(**exact, **shared)
    walks = op.walk_kernel.launches
    inputs = {k: v.detach() for k, v in cases.cast(exact, dtype_of(case), "cpu").items()}
    got = op.ssd_forward(**inputs, **shared, return_final_states=True, config=config)
    launches = [op.state_kernel.launches, op.scan_kernel.launches, op.fused_kernel.launches]
    found = {"out": cases.relative_error(got[0], out)}
    found["final_states"] = cases.relative_error(got[1], state)
    nchunks = -(-case["seqlen"] // 64)
    per_segment = -(-nchunks // config.segments) * 64
    for index, start in enumerate(range(per_segment, case["seqlen"], per_segment), 1):
        timed = ("x", "dt", "B", "C", "z")
        head = {k: v[:, :start] if k in timed else v for k, v in exact.items()}
        entry = cases.loop(**head, **shared)[1]
        found[f"entry {index}"] = cases.relative_error(got[2][:, :, index], entry)
    # Without a backward: what enters segments is added up by the scan, or by a launch in bf16; and
    # in parts of the sequence.
    ways = {
        "combined": {"combined": 16}, "by a launch": {"combined": 0},
        "in parts": {"walk": 1},
    }  # fmt: skip
    if config.fused or config.look_back:
        ways = {"alone": {}, "in parts": {"walk": 1}}
    for way, changed in ways.items() if nchunks > 1 and config.segments > 1 else ():
        again = op.ssd_forward(
            **inputs, **shared, return_final_states=True, keep=False,
            config=replace(config, **changed),
        )  # fmt: skip
        found[f"out, {way}"] = cases.relative_error(again[0], out)
        found[f"final_states, {way}"] = cases.relative_error(again[1], state)
        if again[2] is not None:
            raise ValueError("states are kept for no backward")
    return found | {"launches": [*launches, op.walk_kernel.launches - walks]}


def dtype_of(case):
    return getattr(torch, case["dtype"])


def judged(op, job):
    """Return a case's errors, or what it raised where a fault is planted."""
    case = job["case"]
    if "changes" not in job:
        return errors(op, case)
    try:
        with planted(op, job["changes"], case):
            return errors(op, case)
    except (RuntimeError, IndexError, TypeError) as raised:  # what the machine says of a kernel
        return {"raised": repr(raised)}


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    op = load()
    torch.set_grad_enabled(False)
    print(json.dumps([judged(op, job) for job in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
