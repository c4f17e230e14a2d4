"""Random calls of the RMS norm, and their judgement against float64.

As a script, `python norm_cases.py COUNT` prints as JSON what is wrong with this many calls in
Triton's interpreter (TRITON_INTERPRET=1 is to be set), which planted faults went unnoticed, and
what is wrong with the operator under compilers and transforms.
"""

import importlib.util
import json
import random
import runpy
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import silu

ROOT = Path(__file__).resolve().parents[3]
EPS = 1e-5
# Relative L2 norm; about three times what rounding to nearest gives.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = tuple(TOLERANCE)

# In the kernels' source: what is right, and what is wrong.
FAULTS = {
    "no eps": ("/ width + eps)", "/ width)"),
    "the mean over the padded width": (
        "tl.sum(rounded_product(dn, n), 1) / width",
        "tl.sum(rounded_product(dn, n), 1) / BLOCK",
    ),
    "a gate's slope": ("(gate + silu * (1.0 - gate))", "(gate + silu * gate)"),
    "no gradient on the other way": ("dx += tl.load(at", "tl.load(at"),
    "a row left out": (
        "mask = (row < rows)[:, None] & inside[None, :]",
        "mask = (row < rows - 1)[:, None] & inside[None, :]",
    ),
    "a partial sum left out": (
        "mask = (first + part < parts)",
        "mask = (first + part < parts - 1)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A call: rows and their width, dtype, options."""

    batch: int
    seqlen: int
    width: int
    dtype: torch.dtype
    gated: bool
    strided: bool  # rows of something wider
    residual: bool
    small: bool  # values near eps
    overwrite: bool


def draw_shape(draw, *, small):
    """Return a random call."""
    return Shape(
        batch=draw.choice((1, 2, 3)),
        seqlen=draw.choice((1, 5, 21) if small else (1, 33, 300, 2048)),
        width=draw.choice((1, 20, 130) if small else (1, 20, 1000, 2048, 4096, 5440)),
        # The interpreter truncates to bf16 where hardware rounds.
        dtype=draw.choice(DTYPES[:2] if small else DTYPES),
        gated=draw.random() < 0.5,
        strided=draw.random() < 0.5,
        residual=draw.random() < 0.5,
        small=draw.random() < 0.3,
        overwrite=draw.random() < 0.5,
    )


def make(shape, *, seed, device):
    """Return x, weight, z, the output's gradient and the other one, as calls take them."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size, scale=1.0):
        values = torch.randn(size, generator=generator, device=device) * scale
        return values.to(shape.dtype)

    def rows(scale=1.0):
        wider = 16 if shape.strided else 0
        size = (shape.batch, shape.seqlen, shape.width + wider)
        return normal(*size, scale=scale)[..., : shape.width]

    x, z = rows(1e-2 if shape.small else 1.0), rows() if shape.gated else None
    return x, 1 + normal(shape.width, scale=0.3), z, rows(), rows() if shape.residual else None


def reference(x, weight, z, dout, residual):
    """Return the output and the gradients of x, weight and z in float64, and what each is held to.

    That is its norm. In a narrow row the gradient of x is a difference of two that nearly cancel:
    it is held to the larger one's norm.
    """
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, z) if t is not None]
    g = leaves[0] if z is None else leaves[0] * silu(leaves[2])
    rstd = 1 / (g.square().mean(-1, keepdim=True) + EPS).sqrt()
    out, at_that_scale = g * rstd * leaves[1], g * rstd.detach() * leaves[1]
    parts = torch.autograd.grad(at_that_scale, leaves, dout.double(), retain_graph=True)
    dx, *others = torch.autograd.grad(out, leaves, dout.double())
    want = (out.detach(), dx if residual is None else dx + residual.double(), *others)
    sizes = [max(float(a.norm()), float(b.norm())) for a, b in zip(want[1:], parts, strict=True)]
    return want, (float(out.detach().norm()), *sizes)


def wrong(shape, *, seed, device):
    """Run forward and backward twice; return what is wrong, by name."""
    from mambench.kernels.norm.triton_norm import norm_backward, norm_forward

    x, weight, z, dout, residual = made = make(shape, seed=seed, device=device)
    (want, sizes), found, results = reference(*made), {}, []
    for _ in range(2):  # the second goes the way of a launch that is known
        out, rstd = norm_forward(x, weight, z, EPS)
        grad = dout.clone()
        back = norm_backward(
            x, weight, z, rstd, grad, residual=residual, give_out=True, overwrite=shape.overwrite
        )
        if not shape.overwrite and not torch.equal(grad, dout):
            found["dout"] = "overwritten"
        results.append([t for t in (out, *back) if t is not None])
    names = ["out", "dx", "dweight", *(["dz"] if shape.gated else [])]
    for name, got, right, size in zip(names, results[0], want, sizes, strict=False):
        error = float((got.double() - right).norm()) / size
        if not error <= TOLERANCE[shape.dtype] or got.shape != right.shape:
            found[name] = f"{error:.2e}"
    if not torch.equal(results[0][-1], results[0][0]):
        found["out again"] = "other bits"
    if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        found["repeated"] = "other bits"
    return found


PLANTED = Shape(
    batch=2, seqlen=5, width=20, dtype=torch.float32, gated=True, strided=True, residual=True,
    small=True, overwrite=False,
)  # fmt: skip


def unnoticed(device="cpu"):
    """Plant every fault in a copy of the kernels; return those that a call does not notice."""
    from mambench.kernels.norm import triton_kernels, triton_norm

    source = Path(triton_kernels.__file__).read_text()
    missed = []
    for name, (right, fault) in FAULTS.items():
        assert right in source, right
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "faulty.py"
            path.write_text(source.replace(right, fault))
            spec = importlib.util.spec_from_file_location("faulty", path)
            triton_norm.triton_kernels = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(triton_norm.triton_kernels)
            if not wrong(PLANTED, seed=0, device=device):
                missed.append(name)
    triton_norm.triton_kernels = triton_kernels
    return missed


def traced():
    """Return what is wrong with the operator under compilers and transforms."""
    from mambench.kernels.norm.triton_norm import rms_norm

    tensors = (torch.randn(2, 3, 20), torch.randn(20), torch.randn(2, 3, 20))
    leaves = [t.detach().requires_grad_() for t in tensors]

    def loss(*given):
        return rms_norm(*given).square().sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ways = {
        "compile": torch.autograd.grad(compiled(*leaves), leaves),
        "func": torch.func.grad(loss, (0, 1, 2))(*tensors),
    }
    failed = {
        way: "other gradients"
        for way, got in ways.items()
        if not all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))
    }
    checks = torch.library.opcheck(
        torch.ops.mambench.rms_norm_triton.default,
        (*leaves, EPS, True),
        test_utils=("test_schema", "test_faketensor"),
        raise_exception=False,
    )
    return failed | {k: str(v)[:300] for k, v in checks.items() if v != "SUCCESS"}


def main():
    """Judge random calls, planted faults and traced calls."""
    package = ROOT / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    torch.set_num_threads(1)
    draw = random.Random(0)
    found = {}
    for seed in range(int(sys.argv[1])):
        shape = draw_shape(draw, small=True)
        if problems := wrong(shape, seed=seed, device="cpu"):
            found[str(asdict(shape))] = problems
    print(json.dumps({"wrong": found, "unnoticed": unnoticed(), "traced": traced()}))


if __name__ == "__main__":
    main()
