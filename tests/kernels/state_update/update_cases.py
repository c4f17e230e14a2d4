"""Random shapes and tensors of the state update, and its judgement against float64.

As a script, `python update_cases.py COUNT` runs the Triton operation on this many shapes (in the
interpreter where TRITON_INTERPRET=1 is set) and prints as JSON what is wrong, and what is with a
planted fault.
"""

import importlib.util
import json
import random
import runpy
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import silu, softplus

# Relative L2 norm; about twice what rounding to nearest gives.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
DTYPES = tuple(TOLERANCE)
MOST_STATES = 1 << 26  # 512 MiB in float64


def draw_shape(draw, *, small):
    """Return a random call: family, sizes, dtypes and options."""
    groups = draw.choice((1, 2, 3) if small else (1, 1, 2, 3, 8))
    per_group = draw.choice((1, 2, 3)) if small else draw.choice((1, 3, 10, 64, 100))
    ssd = draw.random() < 0.5
    if not ssd:
        per_group *= draw.choice((1, 7)) if small else draw.choice((1, 7, 16))
    # The interpreter truncates to bf16 where hardware rounds.
    dtypes = DTYPES[:2] if small else DTYPES
    headdim = draw.choice((1, 8, 33) if small else (1, 8, 33, 64, 100)) if ssd else None
    d_state = draw.choice((1, 5, 16, 40) if small else (1, 5, 16, 64, 100, 128, 256))
    batches = (1, 2, 3) if small else (1, 2, 7, 33, 128, 300)
    room = max(1, MOST_STATES // (groups * per_group * (headdim or 1) * d_state))
    return {
        "batch": min(draw.choice(batches), room),
        "entries": groups * per_group,
        "groups": groups,
        "headdim": headdim,
        "d_state": d_state,
        "dtype": draw.choice(dtypes),
        "state_dtype": draw.choice(dtypes),
        "gated": draw.random() < 0.5,
        "skip": draw.random() < 0.7,
        "bias": draw.random() < 0.7,
        "softplus": draw.random() < 0.8,
        "strided": draw.random() < 0.3,
        "extreme": draw.random() < 0.2,
    }


def make(shape, *, seed, device):
    """Return the tensors of a call: (positional, keywords)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    batch, entries, headdim = shape["batch"], shape["entries"], shape["headdim"]

    def normal(*size, dtype=shape["dtype"]):
        # A batch that is strided: what slices of a projection's output and of a larger cache are.
        width = 1
        for extent in size[1:]:
            width *= extent
        more = 16 if shape["strided"] and size[0] == batch else 0
        values = torch.randn(size[0], width + more, generator=generator, device=device)
        return values.to(dtype)[:, :width].unflatten(1, size[1:])

    rows = (batch, entries) if headdim is None else (batch, entries, headdim)
    x, z = normal(*rows), normal(*rows)
    state = normal(*rows, shape["d_state"], dtype=shape["state_dtype"])
    dt = normal(batch, entries)
    per_entry = (entries, shape["d_state"]) if headdim is None else (entries,)
    A = -torch.rand(per_entry, generator=generator, device=device) * 16
    if shape["extreme"]:  # from states that never decay to those that do at once; large steps
        A = A * torch.where(torch.arange(entries, device=device) % 2 == 0, 1e-6, 1e4).view(
            -1, *[1] * (A.dim() - 1)
        )
        dt = dt * 30
    if not shape["softplus"]:
        dt = dt.abs() * 0.1  # steps are positive
    B, C = (normal(batch, shape["groups"], shape["d_state"]) for _ in range(2))
    D = torch.randn(entries, generator=generator, device=device)
    bias = torch.rand(entries, generator=generator, device=device) * 4 - 5
    if shape["strided"]:  # parameters that are columns of something, one of them narrow
        A, D = A.repeat_interleave(2, -1)[..., ::2], D.repeat_interleave(3)[::3]
        bias = bias.to(torch.bfloat16)
    if not shape["softplus"]:
        bias = bias.abs() * 0.01
    keywords = {
        "D": D if shape["skip"] else None,
        "z": z if shape["gated"] else None,
        "dt_bias": bias if shape["bias"] else None,
        "dt_softplus": shape["softplus"],
    }
    return (state, x, dt, A, B, C), keywords


def reference(positional, keywords):
    """Return y and the state in float64, written for all entries alike."""
    state, x, dt, A, B, C = (t.double() for t in positional)
    D, z, bias = (
        None if keywords[k] is None else keywords[k].double() for k in ("D", "z", "dt_bias")
    )
    each = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(each, 1) for t in (B, C))
    dt = dt if bias is None else dt + bias
    dt = softplus(dt, threshold=1e9) if keywords["dt_softplus"] else dt
    if state.dim() == 4:
        decay = torch.exp(dt * A)[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt, x, B)
        y = torch.einsum("bhpn,bhn->bhp", state, C)
        y = y if D is None else y + D[:, None] * x
    else:
        state = torch.exp(dt[..., None] * A) * state + torch.einsum("bd,bd,bdn->bdn", dt, x, B)
        y = torch.einsum("bdn,bdn->bd", state, C)
        y = y if D is None else y + D * x
    return (y if z is None else y * silu(z)), state


def wrong(operation, shape, *, seed, device, **options):
    """Call an operation twice; return what is wrong with its outputs and the state, by name."""
    positional, keywords = make(shape, seed=seed, device=device)
    found = {}
    for call in (1, 2):  # the second goes the way of a launch that is known
        y_true, state_true = reference(positional, keywords)
        y = operation(*positional, **keywords, **options)
        for name, got, want in (("y", y, y_true), ("state", positional[0], state_true)):
            tolerance = TOLERANCE[got.dtype]
            # y is a sum that may cancel, of values that were rounded when they were read.
            error = float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
            if not error <= tolerance or got.shape != want.shape:
                found[f"{name}, call {call}"] = f"{error:.2e} > {tolerance:.0e}"
        if y.dtype != shape["dtype"]:
            found["dtype"] = str(y.dtype)
    return found


def traced(operation, shape, device, backend):
    """Compile several tokens in one graph; return what has not the bits of eager calls, by name."""
    positional, keywords = make(shape, seed=0, device=device)
    state, x, *others = positional

    def tokens(state, x):
        outputs = []
        for _ in range(3):
            outputs.append(operation(state, x, *others, **keywords))
            x = -x
        return torch.stack(outputs)

    torch._dynamo.reset()
    states = state.clone(), state.clone()
    with torch.no_grad():
        want = tokens(states[0], x)
        got = torch.compile(tokens, fullgraph=True, backend=backend)(states[1], x)
    pairs = {"y": (got, want), "state": states}
    changed = [] if not torch.equal(states[0], state) else ["nothing was updated"]
    return changed + [name for name, (a, b) in pairs.items() if not torch.equal(a, b)]


def describe(shape):
    """Return a shape as text."""
    return " ".join(f"{key}={value}" for key, value in shape.items())


RIGHT, FAULT = "(dt * x)[:, None] * B[None, :]", "x[:, None] * B[None, :]"


def faulty():
    """Return a copy of the kernels' module with the fault."""
    from mambench.kernels.state_update import triton_kernels

    source = Path(triton_kernels.__file__).read_text()
    if RIGHT not in source:
        raise ValueError(f"not in the kernels' source: {RIGHT}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "faulty.py"
        path.write_text(source.replace(RIGHT, FAULT))
        spec = importlib.util.spec_from_file_location("faulty", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.ssd_update_kernel.rewrite()  # while its source is there
    return module


def main():
    """Run the Triton operation on random small shapes on the CPU."""
    package = Path(__file__).resolve().parents[3] / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    from mambench.kernels.state_update import triton_update

    def judged(count):
        draw = random.Random(0)
        shapes = [draw_shape(draw, small=True) for _ in range(count)]
        operation = triton_update.selective_state_update
        return {
            describe(shape): wrong(operation, shape, seed=seed, device="cpu")
            for seed, shape in enumerate(shapes)
        }

    found = {"found": judged(int(sys.argv[1]))}
    triton_update.ssd_update_kernel = faulty().ssd_update_kernel
    triton_update._calls.clear()
    print(json.dumps(found | {"faulty": judged(2)}))


if __name__ == "__main__":
    main()
