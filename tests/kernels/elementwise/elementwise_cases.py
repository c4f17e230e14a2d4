"""Calls of the rotation and the gated product, judged against float64.

As a script it prints as JSON what is wrong in Triton's interpreter (TRITON_INTERPRET=1 is to be
set), and which planted faults went unnoticed.
"""

import importlib.util
import json
import runpy
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import silu

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}

# In the kernels' source: what is right, and what is wrong.
FAULTS = {
    "the wrong way round": ("first * cos - second * sin", "first * cos + second * sin"),
    "not undone": ("second * cos - first * sin", "second * cos + first * sin"),
    "another sequence's positions": ("token % seqlen, place", "token, place"),
    "values rotated": ("HALF, False,", "HALF, True,"),
    "the gate's slope": ("(share + silu * (1.0 - share))", "share"),
}


def error(got, want):
    """Return the relative L2 error."""
    return float((got.double() - want).norm() / want.norm())


def rotation(device, dtype, *, batch=2, seqlen=5, nheads=3, headdim=8):
    """Return what is wrong with a rotation and its gradient."""
    from mambench.implementations.blocks.transformer import rotary_tables, rotate
    from mambench.kernels.elementwise.triton_elementwise import rotate_, rotate_back

    generator = torch.Generator(device=device).manual_seed(0)
    shape = (batch, seqlen, 3, nheads, headdim)
    qkv = torch.randn(shape, generator=generator, device=device).to(dtype)
    tables = rotary_tables(seqlen, headdim, dtype=dtype, device=device)
    wide = qkv.double().requires_grad_()
    turned = rotate(wide[:, :, :2], *(table.double() for table in tables))
    want = torch.cat((turned, wide[:, :, 2:]), 2)
    # Gradients as mixers leave them: dense, and a part of something.
    grads = torch.randn(shape, generator=generator, device=device).to(dtype)
    dq, dk, dv = grads.unbind(2)
    (right,) = torch.autograd.grad(want, wide, grads.double())
    found = {}
    for call in (1, 2):
        got = qkv.clone()
        rotate_(got, *tables)
        back = rotate_back(dq.contiguous(), dk, dv.mT.contiguous().mT, *tables)
        for name, value, truth in (("out", got, want.detach()), ("gradient", back, right)):
            if not error(value, truth) <= TOLERANCE[dtype]:
                found[f"rotation {dtype} {name} {call}"] = error(value, truth)
    return found


def product(device, dtype, *, rows=4, width=40):
    """Return what is wrong with a gated product and its gradient."""
    from mambench.kernels.elementwise.triton_elementwise import (
        gated_product,
        gated_product_backward,
    )

    generator = torch.Generator(device=device).manual_seed(0)
    both = torch.randn(rows, 2 * width, generator=generator, device=device).to(dtype)
    dout = torch.randn(rows, width, generator=generator, device=device).to(dtype)
    wide = both.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    want = silu(gate) * up
    (right,) = torch.autograd.grad(want, wide, dout.double())
    found = {}
    for call in (1, 2):
        got, (back, again) = gated_product(both), gated_product_backward(both, dout.clone())
        checks = (("out", got, want.detach()), ("gradient", back, right), ("again", again, want))
        for name, value, truth in checks:
            if not error(value, truth.detach()) <= TOLERANCE[dtype]:
                found[f"product {dtype} {name} {call}"] = error(value, truth.detach())
        if not torch.equal(got, again):
            found["again"] = "other bits"
    return found


def wrong(device, dtypes):
    """Return what is wrong in any dtype."""
    found = {}
    for dtype in dtypes:
        found |= rotation(device, dtype) | product(device, dtype)
    return found


def unnoticed(device="cpu"):
    """Plant every fault in a copy of the kernels; return those that no call notices."""
    from mambench.kernels.elementwise import triton_elementwise, triton_kernels

    source = Path(triton_kernels.__file__).read_text()
    missed = []
    for name, (right, fault) in FAULTS.items():
        assert right in source, right
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "faulty.py"
            path.write_text(source.replace(right, fault))
            spec = importlib.util.spec_from_file_location("faulty", path)
            triton_elementwise.triton_kernels = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(triton_elementwise.triton_kernels)
            if not wrong(device, (torch.float32,)):
                missed.append(name)
    triton_elementwise.triton_kernels = triton_kernels
    return missed


def main():
    """Judge both, and the planted faults."""
    package = ROOT / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    torch.set_num_threads(1)
    found = wrong("cpu", (torch.float32, torch.float16))
    print(json.dumps({"wrong": found, "unnoticed": unnoticed()}))


if __name__ == "__main__":
    main()
