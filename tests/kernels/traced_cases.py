"""Calls of our operations as compilers and transforms make them, to be compared with eager ones.

Run as a script it judges the variant named, for instance a Triton one in Triton's interpreter,
which needs a process of its own (TRITON_INTERPRET is read when a kernel is defined).
"""

import importlib
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]

# module, whether it takes an initial state, whether several sequences in a row
VARIANTS = {
    "s6_numba": ("mambench.kernels.s6.numba_scan", True, False),
    "s6_triton": ("mambench.kernels.s6.triton_scan", True, False),
    "s6_hopper": ("mambench.kernels.s6.hopper_op", False, False),
    "ssd_torch": ("mambench.kernels.ssd.torch_ssd", True, True),
    "ssd_triton": ("mambench.kernels.ssd.triton_ssd", True, True),
    "ssd_hopper": ("mambench.kernels.ssd.hopper_op", True, False),
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One variant's operator, and tensors to call it with: `call(tensors)` gives out and state."""

    variant: str
    operation: Callable
    names: tuple[str, ...]  # of the tensors
    tensors: tuple[Tensor, ...]
    fixed: dict  # the other arguments

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return self.operation(**dict(zip(self.names, tensors, strict=True)), **self.fixed)

    def loss(self, *tensors: Tensor) -> Tensor:
        """A number that depends on both results."""
        out, state = self(*tensors)
        return out.float().square().sum() + state.float().sum()

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the eager gradients of the loss."""
        leaves = [t.detach().requires_grad_() for t in self.tensors]
        return torch.autograd.grad(self.loss(*leaves), leaves)

    def operator_arguments(self, *, grad: bool) -> tuple:
        """Return what the registered operator takes, in order, without `keep`."""
        given = {
            name: t.detach().requires_grad_(grad)
            for name, t in zip(self.names, self.tensors, strict=True)
        }
        limits = (0.0, float("inf"))
        if self.variant.startswith("s6"):
            order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
            options = (True,)
        else:
            order = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "seq_idx")
            options = (16, True, *limits) if self.variant == "ssd_torch" else (True, *limits, 2)
        count = {"s6_hopper": 8, "ssd_hopper": 9}.get(self.variant, len(order))
        given["seq_idx"] = self.fixed.get("seq_idx")
        return (*(given.get(name) for name in order[:count]), *options)


def public_operation(variant):
    """Import a variant's public operation."""
    module = importlib.import_module(VARIANTS[variant][0])
    return module.selective_scan if variant.startswith("s6") else module.ssd


def draw(variant, *, device="cpu", dtype=torch.float32, seqlen=40, bare=False, varied=False):
    """Draw a call; `bare`: without what is optional; `varied`: several sequences in a row."""
    generator = torch.Generator().manual_seed(seqlen)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    started, wide = VARIANTS[variant][1] and not bare, torch.float32
    if variant.startswith("s6"):
        batch, d_inner, d_state = 2, 6, 4
        made = {
            "u": normal(batch, d_inner, seqlen), "delta": normal(batch, d_inner, seqlen),
            "A": -normal(d_inner, d_state, dtype=wide).exp(),
            "B": normal(batch, 2, d_state, seqlen), "C": normal(batch, 2, d_state, seqlen),
        }  # fmt: skip
        if not bare:
            made |= {"D": normal(d_inner, dtype=wide), "z": normal(batch, d_inner, seqlen)}
            made["delta_bias"] = normal(d_inner, dtype=wide)
        if started:
            made["initial_state"] = normal(batch, d_inner, d_state, dtype=wide)
        fixed = {"delta_softplus": True, "return_last_state": True}
    else:
        batch, nheads, headdim, d_state = 2, 4, 16, 16
        made = {
            "x": normal(batch, seqlen, nheads, headdim), "dt": normal(batch, seqlen, nheads),
            "A": -normal(nheads, dtype=wide).exp(),
            "B": normal(batch, seqlen, 2, d_state), "C": normal(batch, seqlen, 2, d_state),
        }  # fmt: skip
        if not bare:
            made |= {
                "D": normal(nheads, headdim, dtype=wide),
                "dt_bias": normal(nheads, dtype=wide),
            }
            made["z"] = normal(batch, seqlen, nheads, headdim)
        if started:
            made["initial_states"] = normal(batch, nheads, headdim, d_state, dtype=wide)
        fixed = {"chunk_size": 16, "dt_softplus": True, "return_final_states": True}
        if variant != "ssd_torch":
            fixed["segments"] = 2
        if varied:
            begins = torch.tensor([[0, 15, 16], [1, 2, seqlen - 1]])
            fixed["seq_idx"] = (torch.arange(seqlen)[:, None, None] >= begins).sum(2).T.to(device)
    operation = public_operation(variant)
    return Call(
        variant=variant,
        operation=operation,
        names=tuple(made),
        tensors=tuple(made.values()),
        fixed=fixed,
    )


def same(got, want):
    """Whether tensors have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


CHECKS = (
    *("test_schema", "test_autograd_registration", "test_faketensor"),
    "test_aot_dispatch_dynamic",
)


def by_opcheck(call, checks=CHECKS):
    """Check both operators with torch.library.opcheck; returns the failed checks."""
    operators = torch.ops.mambench
    forward = getattr(operators, call.variant).default
    backward = getattr(operators, f"{call.variant}_backward").default
    plain = call.operator_arguments(grad=False)
    out, state, kept = forward(*plain, True)
    calls = {
        "forward": (forward, (*call.operator_arguments(grad=True), True)),
        "backward": (backward, (out, state, kept, *plain)),
    }
    if checks is CHECKS:
        calls |= {
            "without keeping": (forward, (*plain, False)),
            "backward of the output": (backward, (out, None, kept, *plain)),
            "backward of the state": (backward, (None, state, kept, *plain)),
        }
    failed = {}
    for name, (operator, arguments) in calls.items():
        results = torch.library.opcheck(
            operator, arguments, test_utils=checks, raise_exception=False
        )
        failed |= {f"{name}: {k}": str(v)[:300] for k, v in results.items() if v != "SUCCESS"}
    return failed


def by_compiler(call, *, backend="aot_eager", dynamic=None):
    """Return gradients by a compiled loss, in one graph."""
    torch._dynamo.reset()
    compiled = torch.compile(call.loss, fullgraph=True, backend=backend, dynamic=dynamic)
    leaves = [t.detach().requires_grad_() for t in call.tensors]
    return torch.autograd.grad(compiled(*leaves), leaves)


def by_transform(call):
    """Return gradients by torch.func.grad."""
    return torch.func.grad(call.loss, tuple(range(len(call.tensors))))(*call.tensors)


def by_vjp(call):
    """Return gradients by torch.func.vjp."""
    _, pull = torch.func.vjp(call.loss, *call.tensors)
    return pull(torch.ones((), device=call.tensors[0].device))


def by_samples(call):
    """Return gradients by torch.func.vmap, as the second of two samples of one model."""
    first, *others = call.tensors
    arguments = tuple(range(len(call.tensors)))
    each = torch.func.vmap(
        torch.func.grad(call.loss, arguments), in_dims=(1, *(None for _ in others))
    )
    return [rows[1] for rows in each(torch.stack((2 * first, first), dim=1), *others)]


def by_checkpoint(call):
    """Return gradients with the operation's forward recomputed."""
    leaves = [t.detach().requires_grad_() for t in call.tensors]
    return torch.autograd.grad(checkpoint(call.loss, *leaves, use_reentrant=False), leaves)


WAYS = {
    "torch.compile": by_compiler,
    "torch.func.grad": by_transform,
    "torch.func.vjp": by_vjp,
    "torch.func.vmap": by_samples,
    "checkpoint": by_checkpoint,
}


def judge(call, ways=WAYS, checks=CHECKS):
    """Return what is wrong with a call, by way; nothing when all gradients have the same bits."""
    want = call.gradients()
    wrong = {name: "other gradients" for name in ways if not same(WAYS[name](call), want)}
    return wrong | by_opcheck(call, checks)


def main():
    """Judge a Triton variant, which is slow in the interpreter: in fewer ways, on few values."""
    package = ROOT / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    torch.set_num_threads(1)
    found = {}
    for name in sys.argv[1:]:
        variant, _, what = name.partition(":")
        call = draw(variant, seqlen=20, bare=what == "bare", varied=what == "varied")
        found[name] = judge(call, ("torch.compile",), ("test_faketensor",))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
