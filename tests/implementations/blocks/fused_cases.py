"""Fused blocks against the plain ones in float64, around the families' references.

As a script it prints as JSON what is wrong in Triton's interpreter (TRITON_INTERPRET=1 is to be
set).
"""

import json
import runpy
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]


def make_problem(family, *, batch, seqlen, d_model, ngroups=1):
    """Return a block-level problem of small heads and states."""
    from mambench.harness.spec import Family, Level, Problem

    attention = family is Family.ATTENTION
    return Problem(
        family=family,
        level=Level.BLOCK,
        batch=batch,
        seqlen=seqlen,
        d_model=d_model,
        d_inner=d_model if attention else 2 * d_model,
        headdim=None if family is Family.S6 else 8,
        d_state=None if attention else 4,
        ngroups=None if attention else ngroups,
    )


def results(problem, inputs, mixer, *, fused, times=1):
    """Return y and all gradients, of every one of several backwards."""
    from mambench.implementations.blocks import problem as blocks

    names = blocks.block_family(problem).differentiable(problem)
    leaves = {n: v.detach().clone().requires_grad_(n in names) for n, v in inputs.items()}
    stack = blocks._Bindable(blocks._skeleton(problem, mixer, torch.float32, fused=fused))
    y = stack.bind(leaves)(leaves["x"], *blocks._tables(leaves))
    generator = torch.Generator(device=y.device).manual_seed(1)
    grad = torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
    wanted = [leaves[name] for name in names]
    every = [torch.autograd.grad(y, wanted, grad, retain_graph=True) for _ in range(times)]
    return dict(zip(("y", *names), (y.detach(), *every[0]), strict=True)), every


def wrong(problem, mixer, *, device, dtype, allowed=4.0, floor=1e-6):
    """Return what a fused stack gets worse than a plain one does, or differently the second time.

    The error of a plain stack in the same dtype, `allowed` times, is what a fused one may have.
    """
    from mambench.implementations.blocks import problem as blocks
    from mambench.implementations.problems.base import Sample

    judge = blocks.block_family(problem)
    inputs = judge.make_inputs(problem, dtype=dtype, device=device, seed=0)
    wide = {name: value.double() for name, value in inputs.items()}
    solve = blocks._solver(problem.family).reference
    exact = blocks._MIXERS[problem.family](problem, solve, Sample())
    truth, _ = results(problem, wide, exact, fused=False)
    plain, _ = results(problem, inputs, mixer or exact, fused=False)
    fused, every = results(problem, inputs, mixer or exact, fused=True, times=2)
    found = {}
    for name, value in truth.items():
        size = value.norm()
        error, limit = (float((r[name].double() - value).norm() / size) for r in (fused, plain))
        if not error <= allowed * limit + floor or fused[name].shape != value.shape:
            found[name] = f"{error:.2e}, plain {limit:.2e}"
    if not all(torch.equal(a, b) for a, b in zip(*every, strict=True)):
        found["repeated"] = "other bits"
    return found


def main():
    """Judge every family, with one sequence and with several."""
    package = ROOT / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    from mambench.harness.spec import Family

    torch.set_num_threads(1)
    found = {}
    for family in Family:
        # One sequence goes another way in Mamba's products only.
        shapes = ((2, 5, 2), (1, 9, 1)) if family is Family.S6 else ((2, 5, 2),)
        for batch, seqlen, ngroups in shapes:
            problem = make_problem(family, batch=batch, seqlen=seqlen, d_model=16, ngroups=ngroups)
            if problems := wrong(problem, None, device="cpu", dtype=torch.float32):
                found[f"{family} batch {batch}"] = problems
    print(json.dumps(found))


if __name__ == "__main__":
    main()
