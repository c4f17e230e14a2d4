"""Problems, a literal float64 reference and an error measure for the tests of the SSD kernels.

Run as a script it judges the Triton kernels in Triton's interpreter, which needs a process of its
own (TRITON_INTERPRET is read when a kernel is defined), and prints every case's errors as JSON.
"""

import ast
import contextlib
import dataclasses
import functools
import json
import math
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[3]


def draw(
    *, batch=1, seqlen, nheads=2, headdim=16, ngroups=1, d_state=16, dtype="float32", D=1,
    gated=True, bias=True, start=True, long_memory=False, jolt=0, gone=False, seed=0, **_,
):  # fmt: skip
    """Draw float64 inputs whose values `dtype` can hold; parameters and states are fp32's.

    With `jolt` one token in so many takes a step of 1,024: it wipes the state out, and what follows
    it decays as usual. With `gone` the first head remembers nothing: its A is -inf.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, rounded=True):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(getattr(torch, dtype) if rounded else torch.float32).double()

    heads = torch.rand(nheads, generator=generator, dtype=torch.float64)
    inputs = {
        "x": normal(batch, seqlen, nheads, headdim),
        "dt": (normal(batch, seqlen, nheads) * 0.5 - 2).to(getattr(torch, dtype)).double(),
        "A": (-heads * (4.0 / seqlen if long_memory else 4.0)).float().double(),
        "B": normal(batch, seqlen, ngroups, d_state),
        "C": normal(batch, seqlen, ngroups, d_state),
    }
    if gone:
        inputs["A"][0] = -math.inf
    if jolt:
        inputs["dt"][:, jolt // 2 :: jolt] = 1024.0
    if D:
        inputs["D"] = normal(*((nheads,), (nheads, headdim))[D - 1], rounded=False)
    if gated:
        inputs["z"] = normal(batch, seqlen, nheads, headdim)
    if bias:
        inputs["dt_bias"] = normal(nheads, rounded=False) * 0.25
    if start:
        inputs["initial_states"] = normal(batch, nheads, headdim, d_state, rounded=False)
    return inputs


def loop(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None,
    dt_softplus=False, dt_limit=(0.0, math.inf),
):  # fmt: skip
    """The recurrence, one token at a time; returns (out, final states)."""
    repeats = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeats, 2), C.repeat_interleave(repeats, 2)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    state = initial_states
    if state is None:
        state = torch.zeros(*x.shape[:1], *x.shape[2:], B.shape[3], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        u = dt[:, t, :, None] * x[:, t]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + u[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(3))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + x * D.view(x.shape[2], -1)
    return (y if z is None else y * F.silu(z)), state


def one_by_one(lengths, *, initial_states=None, **inputs):
    """Run the loop over every sequence alone; lengths has those of each row of the batch.

    The initial states are those of each row's first sequence, the final ones of its last.
    """
    timed = ("x", "dt", "B", "C", "z")
    rows, finals = [], []
    for b, row in enumerate(lengths):
        outs, state, begin = [], None, 0
        for number, length in enumerate(row):
            span = slice(begin, begin + length)
            part = {k: v[b : b + 1, span] if k in timed else v for k, v in inputs.items()}
            if number == 0 and initial_states is not None:
                part["initial_states"] = initial_states[b : b + 1]
            out, state = loop(**part)
            outs.append(out)
            begin += length
        rows.append(torch.cat(outs, 1))
        finals.append(state)
    return torch.cat(rows), torch.cat(finals)


def sequences(case, device):
    """Return how an implementation is told of a case's sequences: cu_seqlens or seq_idx."""
    lengths = case.get("lengths")
    if lengths is None:
        return {}
    if case.get("cumulative"):
        ends = torch.tensor([0, *lengths[0]]).cumsum(0)
        return {"cu_seqlens": ends.to(device, torch.int32)}
    names = torch.arange(max(map(len, lengths))) * 5 % 3  # only where they change is meant
    rows = [names[: len(row)].repeat_interleave(torch.tensor(row)) for row in lengths]
    return {"seq_idx": torch.stack(rows).to(device, torch.int32)}


def cast(inputs, dtype, device):
    """Return the inputs as an implementation takes them: parameters and states stay fp32."""
    wide = ("A", "D", "dt_bias", "initial_states")
    parameters = torch.float64 if dtype is torch.float64 else torch.float32
    return {
        name: value.to(device, parameters if name in wide else dtype).requires_grad_()
        for name, value in inputs.items()
    }


def options(case):
    """Return the keywords that the reference and the implementations share."""
    limit = tuple(case["dt_limit"]) if "dt_limit" in case else (0.0, math.inf)
    return {"dt_softplus": case.get("dt_softplus", True), "dt_limit": limit}


def evaluate(function, inputs, case, *, final, seed=1):
    """Return outputs and gradients by name, for a drawn gradient of the outputs."""
    out, state = function(**inputs)
    generator = torch.Generator().manual_seed(seed)
    narrow = getattr(torch, case.get("dtype", "float32"))
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(narrow)
    grad_state = torch.randn(state.shape, generator=generator, dtype=torch.float64).float()
    pairs = [(out, grad.to(out))]
    if final:
        pairs.append((state, grad_state.to(state)))
    torch.autograd.backward(*zip(*pairs, strict=True))
    results = {"out": out.detach(), "final_states": state.detach()}
    return results | {f"grad_{name}": value.grad for name, value in inputs.items()}


@functools.lru_cache(maxsize=1)  # planted faults are judged by one case
def truth(items):
    """Return the inputs of a case, given as text, and what the loop makes of them."""
    case = dict(ast.literal_eval(items))
    inputs = draw(**case)
    exact = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    alone = loop if "lengths" not in case else functools.partial(one_by_one, case["lengths"])
    shared = options(case)
    want = evaluate(
        lambda **given: alone(**given, **shared), exact, case, final=case.get("final", True)
    )
    return inputs, want


def errors(op, case, *, device="cpu", **keywords):
    """Return each output's and gradient's relative error (2-norm) against the loop in float64."""
    drawn, want = truth(repr(sorted(case.items())))
    inputs = {name: value.clone() for name, value in drawn.items()}  # gradients stay with them
    dtype = getattr(torch, case.get("dtype", "float32"))
    final = case.get("final", True)
    shared = options(case)
    keywords |= sequences(case, device)

    def call(**given):
        chunk = case.get("chunk_size", 64)
        return op(**given, chunk_size=chunk, return_final_states=True, **shared, **keywords)

    got = evaluate(call, cast(inputs, dtype, device), case, final=final)
    names = ("out", "final_states") if case.get("gone") else want  # no gradient is finite there
    return {name: relative_error(got[name], want[name]) for name in names}


def relative_error(got, want):
    """Return ||got - want|| / ||want||; infinite if anything is not finite."""
    got, want = got.detach().double().cpu(), want.detach()
    difference = (got - want).norm() / want.norm().clamp_min(1e-30)
    return float(difference) if torch.isfinite(difference) else math.inf


def tolerance(dtype):
    """Bound of a relative error: a few roundings of a result in a narrow dtype, sums in fp32.

    fp32 differs by the running sums of log-decay, whose rounding grows with their length.
    """
    return {"float64": 2.0**-40, "float32": 2.0**-17}.get(
        dtype, 4 * torch.finfo(getattr(torch, dtype)).eps
    )


def failures(op, case, **keywords):
    """Return the names and errors of what is off by more than the tolerance."""
    bound = tolerance(case.get("dtype", "float32"))
    found = errors(op, case, **keywords)
    return {name: error for name, error in found.items() if not error <= bound}


def main():
    """Judge the Triton kernels on the cases given, with uninitialised memory poisoned."""
    package = ROOT / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    from mambench.kernels.ssd.triton_ssd import ssd

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    found = []
    for case in json.loads(sys.argv[1]):
        with tiled(case.get("tiling", {})):
            found.append(errors(ssd, case, segments=case.get("segments")))
    print(json.dumps(found))


@contextlib.contextmanager
def tiled(changes):
    """Launch with tilings that are changed so: with what is pinned for a GPU, elsewhere."""
    from mambench.kernels.ssd import triton_launch

    pinned = triton_launch.tiling

    def tiling(*sizes, **on):
        return dataclasses.replace(pinned(*sizes, **on), **changes)

    with mock.patch.object(triton_launch, "tiling", tiling):
        yield


if __name__ == "__main__":
    main()
