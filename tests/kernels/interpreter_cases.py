"""Small kernels in Triton's interpreter, first as it is, then as `quick_interpreter` has it.

Run as `TRITON_INTERPRET=1 python interpreter_cases.py` it prints as JSON whose results have other
bits, and whose have where a fault is planted in the second: constants of fp32 that are one more.
"""

import json

import quick_interpreter
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder


@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def walk(decay_before, state_before, decay, state):
    return decay_before * decay, decay * state_before + state


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, n, m, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK)[None, :]
    mask = (i < n)[:, None] & (j < m)
    x = tl.load(x_ptr + i[:, None] * m + j, mask=mask, other=0.5)
    y = tl.load(y_ptr + i, mask=i < n, other=0.0)
    z = (
        larger(x, y[:, None]) * 2
        - x / 0.75
        + (i // 2 % 3)[:, None]
        + tl.exp2(-tl.abs(x)).to(tl.float16)
    )
    for step in range(0, n, 3):
        z += tl.sum(x, 1)[:, None] * step / (m + 1) - tl.max(x, 0)[None, :]
    tl.store(out_ptr + i[:, None] * m + j, z, mask=mask)


@triton.jit
def products(x_ptr, y_ptr, out_ptr, n, m, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (i < n) & (j < m)
    x = tl.load(x_ptr + i * m + j, mask=mask, other=0.0)
    made = tl.dot(x, tl.trans(x), input_precision="ieee") + tl.load(
        y_ptr + i, mask=i < n, other=1.0
    )
    tl.store(out_ptr + i * m + j, made + tl.cumsum(x, 0), mask=mask)


@triton.jit
def scans(x_ptr, y_ptr, out_ptr, n, m, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (i < n) & (j < m)
    x = tl.load(x_ptr + i * m + j, mask=mask, other=0.0)
    _, states = tl.associative_scan((tl.exp(-tl.abs(x)), x), 1, walk)
    most = tl.reduce(x, 1, larger)
    tl.store(out_ptr + i * m + j, states + most[:, None], mask=mask)


@triton.jit
def added(x_ptr, y_ptr, out_ptr, n, m, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1.0, mask=i < n)


KERNELS = {"arithmetic": arithmetic, "products": products, "scans": scans, "added": added}


def results():
    """Return what the kernels make of the same tensors."""
    generator = torch.Generator().manual_seed(0)
    n, m = 13, 11
    x, y = torch.randn(n, m, generator=generator), torch.randn(n, generator=generator)
    made = {name: torch.full_like(x, 7.0) for name in KERNELS}
    for name, kernel in KERNELS.items():
        kernel[(2 if name == "arithmetic" else 1,)](x, y, made[name], n, m, BLOCK=16)
    return made


def main():
    """Compare both, and then with a fault."""
    before = results()
    quick_interpreter.install()

    def unequal():
        return [name for name, made in results().items() if not torch.equal(made, before[name])]

    found = {"unequal": unequal()}
    right = InterpreterBuilder.get_fp32
    InterpreterBuilder.get_fp32 = lambda self, value: right(self, value + 1)
    print(json.dumps(found | {"noticed": unequal()}))


if __name__ == "__main__":
    main()
