"""Random calls of the causal convolution, and their judgement against float64.

As a script, `python conv_cases.py COUNT` prints as JSON what is wrong with this many calls in
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
from torch.nn.functional import conv1d, pad, silu

ROOT = Path(__file__).resolve().parents[3]
# Relative L2 norm; about three times what rounding to nearest gives.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = tuple(TOLERANCE)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A call: sizes, dtype, options, layout and how the gradient comes."""

    batch: int
    channels: int
    seqlen: int
    taps: int
    dtype: torch.dtype
    bias: bool
    silu: bool
    channels_last: bool
    strided: bool  # a part of something wider
    ranges: int  # of the gradient where channels are contiguous
    more: bool  # a second gradient where time is contiguous


def draw_shape(draw, *, small):
    """Return a random call."""
    channels_last = draw.random() < 0.5
    sizes = (1, 7, 8, 33, 130, 260) if small else (1, 7, 64, 1000, 2048, 4099)
    return Shape(
        batch=draw.choice((1, 2, 3)),
        channels=draw.choice((3, 5, 20) if channels_last and small else (3, 5, 9, 16)),
        seqlen=draw.choice(sizes),
        taps=draw.choice((1, 2, 3, 4, 4, 4)),
        # The interpreter truncates to bf16 where hardware rounds.
        dtype=draw.choice(DTYPES[:2] if small else DTYPES),
        bias=draw.random() < 0.7,
        silu=draw.random() < 0.8,
        channels_last=channels_last,
        strided=draw.random() < 0.5,
        ranges=draw.choice((1, 2, 3)) if channels_last else 1,
        more=not channels_last and draw.random() < 0.5,
    )


def make(shape, *, seed, device):
    """Return x, weight, bias, the output's gradient and the second one, as calls take them."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, device=device).to(shape.dtype)

    wider = 16 if shape.strided else 0
    if shape.channels_last:
        x = normal(shape.batch, shape.seqlen, shape.channels + wider)[..., : shape.channels].mT
        dout = normal(shape.batch, shape.seqlen, shape.channels).mT
    else:  # strided: of a product over all tokens, (C, B L)
        x = normal(shape.batch, shape.channels + wider, shape.seqlen)[:, : shape.channels]
        if shape.strided:
            x = normal(shape.channels, shape.batch, shape.seqlen).transpose(0, 1)
        dout = normal(shape.batch, shape.channels, shape.seqlen)
    weight = normal(shape.taps, shape.channels).T
    bias = normal(shape.channels) if shape.bias else None
    return x, weight, bias, dout, torch.randn_like(dout) if shape.more else None


def reference(shape, x, weight, bias, dout, more):
    """Return the output and all gradients in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias) if t is not None]
    given = leaves[2] if bias is not None else None
    padded = pad(leaves[0], (shape.taps - 1, 0))
    out = conv1d(padded, leaves[1][:, None], given, groups=shape.channels)
    out = silu(out) if shape.silu else out
    total = dout.double() if more is None else dout.double() + more.double()
    return (out, *torch.autograd.grad(out, leaves, total))


def wrong(shape, *, seed, device, times=2):
    """Run forward and backward; return what is wrong, by name."""
    from mambench.kernels.conv.triton_conv import conv_backward, conv_forward

    x, weight, bias, dout, more = made = make(shape, seed=seed, device=device)
    want = reference(shape, *made)
    widths = [shape.channels // shape.ranges] * (shape.ranges - 1)
    ranges = dout.split([*widths, shape.channels - sum(widths)], 1)
    found, results = {}, []
    for _ in range(times):  # the second goes the way of a launch that is known
        out = conv_forward(x, weight, bias, shape.silu)
        back = conv_backward(x, weight, bias, ranges, shape.silu, more=more)
        results.append([t for t in (out, *back) if t is not None])
    for name, got, right in zip(("out", "dx", "dweight", "dbias"), results[0], want, strict=False):
        error = float(
            (got.double() - right).detach().norm() / right.detach().norm().clamp(min=1e-30)
        )
        if not error <= TOLERANCE[shape.dtype] or got.shape != right.shape:
            found[name] = f"{error:.2e}"
        if got.dtype != shape.dtype:
            found[f"{name}'s dtype"] = str(got.dtype)
    if not all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True)):
        found["repeated"] = "other bits"
    return found


SMALL = {
    "batch": 1, "taps": 4, "dtype": torch.float32, "bias": True, "silu": True, "strided": True,
}  # fmt: skip
TIME = Shape(channels=3, seqlen=300, channels_last=False, ranges=1, more=True, **SMALL)
CHANNELS = Shape(channels=7, seqlen=20, channels_last=True, ranges=3, more=False, **SMALL)
# The call that notices it; in the kernels' source, what is right, and what is wrong.
FAULTS = {
    "a tap too early": (
        TIME,
        "pre += weight[:, None] * x[5 + k + tap]",
        "pre += weight[:, None] * x[4 + k + tap]",
    ),
    "a tap dropped in the backward": (
        TIME,
        "dx += w1 * gradients[k + 2] + w0 * gradients[k + 3]",
        "dx += w1 * gradients[k + 2]",
    ),
    "no second gradient after a run": (
        TIME,
        "            dout_after += tl.load(",
        "            tl.load(",
    ),
    "a run's first steps from zero": (
        CHANNELS,
        "x2 = _step_before(x_at, 1,",
        "x2 = _step_before(x_at, 1 + 99999,",
    ),
    "the next run's gradients missing": (
        CHANNELS,
        "+ (STEPS + i) * stride_time, mask=mask",
        "+ (STEPS + i) * stride_time, mask=mask & (i < 0)",
    ),
    "a range's channels shifted": (
        CHANNELS,
        "offset = tl.where(third, width0 + width1, offset)",
        "offset = tl.where(third, width0, offset)",
    ),
    "a partial sum left out": (
        TIME,
        "mask = (first + part < parts)",
        "mask = (first + part < parts - 1)",
    ),
}


def unnoticed(device="cpu"):
    """Plant every fault in a copy of the kernels; return those that go unnoticed."""
    from mambench.kernels.conv import triton_conv, triton_kernels

    source = Path(triton_kernels.__file__).read_text()
    missed = []
    for name, (shape, right, fault) in FAULTS.items():
        assert right in source, right
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "faulty.py"
            path.write_text(source.replace(right, fault))
            spec = importlib.util.spec_from_file_location("faulty", path)
            triton_conv.triton_kernels = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(triton_conv.triton_kernels)
            if not wrong(shape, seed=0, device=device, times=1):
                missed.append(name)
    triton_conv.triton_kernels = triton_kernels
    return missed


def traced():
    """Return what is wrong with the operator under compilers and transforms, both layouts."""
    from mambench.kernels.conv.triton_conv import causal_conv1d

    failed = {}
    for last in (False, True):
        x = torch.randn(1, 20, 5).mT if last else torch.randn(1, 5, 20)
        tensors = (x, torch.randn(5, 4), torch.randn(5))
        leaves = [t.detach().requires_grad_() for t in tensors]

        def loss(*given):
            return causal_conv1d(*given, "silu").square().sum()

        eager = torch.autograd.grad(loss(*leaves), leaves)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        ways = {
            "compile": torch.autograd.grad(compiled(*leaves), leaves),
            "func": torch.func.grad(loss, (0, 1, 2))(*tensors),
        }
        for way, got in ways.items():
            if not all(torch.equal(a, b) for a, b in zip(got, eager, strict=True)):
                failed[f"{way}, channels last {last}"] = "other gradients"
        checks = torch.library.opcheck(
            torch.ops.mambench.causal_conv1d_triton.default,
            (*leaves, True, True),
            test_utils=("test_schema", "test_faketensor"),
            raise_exception=False,
        )
        failed |= {f"{k}, {last}": str(v)[:300] for k, v in checks.items() if v != "SUCCESS"}
    return failed


def main():
    """Judge random calls, planted faults and traced calls."""
    package = ROOT / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    torch.set_num_threads(1)
    draw = random.Random(2817)  # its first four calls differ in every option, in both layouts
    found = {}
    drawn = [draw_shape(draw, small=True) for _ in range(int(sys.argv[1]))]
    # What the planted faults are judged by is right without them.
    for seed, shape in enumerate((TIME, CHANNELS, *drawn)):
        if problems := wrong(shape, seed=seed, device="cpu"):
            found[str(asdict(shape))] = problems
    print(json.dumps({"wrong": found, "unnoticed": unnoticed(), "traced": traced()}))


if __name__ == "__main__":
    main()
