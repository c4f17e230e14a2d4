"""Judge the Hopper SSD on the CPU: its Triton kernels interpreted, its Gluon kernels run by torch.

A process of its own, because TRITON_INTERPRET is read when a kernel is defined:
`hopper_cases.py '[{"case": {...}}, ...]'` prints the errors of every case as JSON. A case that has
"changes", [[old, new], ...], runs with the source of its Gluon kernels changed so, to plant a
fault; what that raises is printed in the errors' place.
"""

import ast
import contextlib
import functools
import importlib.util
import json
import math
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

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
beside("quick_interpreter", Path(__file__).parents[1] / "quick_interpreter.py").install()
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
        hopper_walk_alone,
        hopper_walk_kernel,
        hopper_walk_producer,
    )

    modules = (hopper_kernel,)
    if case.get("fused"):
        modules = (hopper_look_back, hopper_fused_kernel)
    elif case.get("look_back"):
        modules = (hopper_look_back, hopper_walk_alone, hopper_walk_producer, hopper_walk_kernel)
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


@functools.lru_cache(maxsize=2)  # planted faults are judged by one case
def truth(items, shared):
    """Return a case's inputs and what the loop makes of them; both are given as text."""
    exact = cases.draw(**dict(ast.literal_eval(items)))
    return exact, cases.loop(**exact, **limited(shared))


def limited(shared):
    """Return how steps are made, from text."""
    softplus, limit = ast.literal_eval(shared)
    return {"dt_softplus": softplus, "dt_limit": tuple(map(float, limit))}


def measured(op, case):
    """Give the relative errors of what a forward leaves, against the loop in float64, by name.

    First without a backward, where that is other work: what enters segments is added up by the
    scan, or by a launch in bf16; and in parts of the sequence.
    """
    case = dict(case)
    config = op.Config(
        pdl=False, segments=case.pop("segments"), scores=case.pop("scores", True),
        fused=case.pop("fused", False), look_back=case.pop("look_back", False),
        alone=case.pop("alone", False),
    )  # fmt: skip
    limit = [str(value) for value in case.pop("dt_limit", (0.0, math.inf))]
    how = repr((case.pop("dt_softplus", True), limit))
    shared = limited(how)
    exact, (out, state) = truth(repr(sorted(case.items())), how)
    inputs = {k: v.detach() for k, v in cases.cast(exact, dtype_of(case), "cpu").items()}
    segmented, walks = case["seqlen"] > 64 and config.segments > 1, op.walk_kernel.launches
    ways = {"combined": {"combined": 16}, "by a launch": {"combined": 0}}
    if config.fused or config.look_back:
        ways = {"alone": {}}
    given = []

    def flags(count, device):
        given.append(torch.zeros(count, dtype=torch.int32))
        return given[-1]

    for way, changed in (ways | {"in parts": {"walk": 1}}).items() if segmented else ():
        with mock.patch("mambench.kernels.prepared.flags", flags):
            got = op.ssd_forward(
                **inputs, **shared, return_final_states=True, keep=False,
                config=replace(config, **changed),
            )  # fmt: skip
        yield f"flags left, {way}", float(any(bool(left.any()) for left in given))
        yield f"out, {way}", cases.relative_error(got[0], out)
        yield f"final_states, {way}", cases.relative_error(got[1], state)
        if got[2] is not None:
            raise ValueError("states are kept for no backward")
    others = (op.state_kernel, op.scan_kernel, op.fused_kernel)
    before = [kernel.launches for kernel in others]
    got = op.ssd_forward(**inputs, **shared, return_final_states=True, config=config)
    launches = [kernel.launches - n for kernel, n in zip(others, before, strict=True)]
    yield "out", cases.relative_error(got[0], out)
    yield "final_states", cases.relative_error(got[1], state)
    for index, entry in enumerate(entries(config, exact, shared), 1):
        yield f"entry {index}", cases.relative_error(got[2][:, :, index], entry)
    yield "launches", [*launches, op.walk_kernel.launches - walks]


def entries(config, exact, shared):
    """Give the loop's states where segments begin, but the first."""
    seqlen, nchunks = exact["x"].shape[1], -(-exact["x"].shape[1] // 64)
    per_segment = -(-nchunks // config.segments) * 64
    timed, begin, states = ("x", "dt", "B", "C", "z"), 0, exact.get("initial_states")
    for end in range(per_segment, seqlen, per_segment):
        part = {k: v[:, begin:end] if k in timed else v for k, v in exact.items()}
        states = cases.loop(**part | {"initial_states": states}, **shared)[1]
        begin = end
        yield states


def dtype_of(case):
    return getattr(torch, case["dtype"])


def judged(op, job):
    """Return a case's errors, or what it raised where a fault is planted.

    With a fault there is no more to be measured once an error is not small.
    """
    case = job["case"]
    if "changes" not in job:
        return dict(measured(op, case))
    found, most = {}, torch.finfo(dtype_of(case)).eps
    try:
        with planted(op, job["changes"], case):
            for name, error in measured(op, case):
                found[name] = error
                if name != "launches" and not error < most:
                    break
    except (RuntimeError, IndexError, TypeError) as raised:  # what the machine says of a kernel
        return {"raised": repr(raised)}
    return found


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    op = load()
    torch.set_grad_enabled(False)
    print(json.dumps([judged(op, job) for job in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
