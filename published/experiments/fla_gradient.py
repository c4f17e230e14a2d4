"""Why fla's fused_chunk_simple_gla fails the gate with gradients: its dg in 16-bit operands, by length.

    python published/experiments/fla_gradient.py model OUT.json          # on a CPU, a minute; torch only
    python published/experiments/fla_gradient.py fla OUT.json FLA_FOLDER # fla 0.6.0 itself, interpreted, two heads

`model` computes what fla's forward and backward compute, in their order and over their chunks of 64, and rounds to 16
bits what their kernels round: the operands of every product. The reference is the same without any rounding. FLA_FOLDER
is the folder that holds the package `fla`; it is copied, because loops have plain integers in Triton's interpreter.
"""
import json, os, runpy, shutil, sys, tempfile
from pathlib import Path
PART, OUT = sys.argv[1], Path(sys.argv[2])
if PART == "fla":
    os.environ["TRITON_INTERPRET"] = "1"
    site = Path(tempfile.mkdtemp())
    shutil.copytree(Path(sys.argv[3]) / "fla", site / "fla")
    source = site / "fla/ops/common/fused_chunk.py"
    source.chmod(0o644)
    source.write_text(source.read_text().replace("i_t.to(tl.int64)", "i_t"))
    sys.path.insert(0, str(site))
import torch
ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "mambench/_start.py"))["load_package"](ROOT / "mambench")
from mambench.harness.spec import Family, Level, Problem
from mambench.implementations.peers.fla import as_ssd
from mambench.implementations.problems.ssd import SsdProblem
T = 64

def chunks(tensors, g, i):
    part = slice(i * T, i * T + T)
    gi = g[:, i].transpose(1, 2)
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    decay = torch.where(mask, (gi[..., :, None] - gi[..., None, :]).exp(), 0.0)
    return part, *(t[:, part].transpose(1, 2) for t in tensors), gi.exp()[..., None], (gi[..., -1:] - gi).exp()[..., None], decay

def model(dtype):
    def r(x): return x if dtype is None else x.to(dtype).float()
    class Gla(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, g):
            ctx.save_for_backward(q, k, v, g)
            kept = q.dtype
            q, k, v = q.float(), k.float(), v.float()
            B, L, H, N = q.shape
            g = g.view(B, L // T, T, H).cumsum(2)
            out, h = torch.zeros_like(v), torch.zeros(B, H, N, v.shape[-1])
            for i in range(L // T):
                part, Q, K, V, entry, left, decay = chunks((q, k, v), g, i)
                out[:, part] = (r((Q @ K.mT) * decay) @ V + (Q @ r(h)) * entry).transpose(1, 2)
                h = h * entry[..., -1:, :] + K.mT @ r(V * left)
            return out.to(kept)
        @staticmethod
        def backward(ctx, do):
            kept = ctx.saved_tensors[0].dtype
            q, k, v, g = (t.float() for t in ctx.saved_tensors)
            do = do.float()
            B, L, H, N = q.shape
            g = g.view(B, L // T, T, H).cumsum(2)
            dq, dk, dv, dg = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros(B, L, H)
            h = torch.zeros(B, H, N, v.shape[-1])
            for i in range(L // T):
                part, Q, K, V, DO, entry, left, decay = chunks((q, k, v, do), g, i)
                d = r((DO @ V.mT) * decay) @ K + r(DO * entry) @ r(h).mT
                dq[:, part], dg[:, part] = d.transpose(1, 2), (Q * d).sum(-1).transpose(1, 2)
                h = h * entry[..., -1:, :] + r(K * left).mT @ V
            dh, after = torch.zeros_like(h), torch.zeros(B, H)
            for i in reversed(range(L // T)):
                part, Q, K, V, DO, entry, left, decay = chunks((q, k, v, do), g, i)
                d = r((V @ DO.mT) * decay.mT) @ Q + (V @ r(dh).mT) * left
                each = dg[:, part].transpose(1, 2) - (K * d).sum(-1)
                after = after + each.sum(-1)  # over all that follows, to the end of the sequence
                dg[:, part] = (after[..., None] + each - each.cumsum(-1)).transpose(1, 2)
                dv[:, part] = (r((K @ Q.mT) * decay.mT) @ DO + (K @ r(dh)) * left).transpose(1, 2)
                dk[:, part] = d.transpose(1, 2)
                dh = dh * entry[..., -1:, :] + Q.mT @ r(DO * entry)
            return dq.to(kept), dk.to(kept), dv.to(kept), dg
    return as_ssd(lambda q, k, v, g, **_: (Gla.apply(q, k, v, g), None), compiled=False)

def fla():
    from triton.runtime.autotuner import Autotuner
    def first(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        return self.fn.run(*args, **kwargs, **self.prune_configs(kwargs)[0].all_kwargs())
    Autotuner.run = first
    from fla.ops.simple_gla.fused_chunk import fused_chunk_simple_gla
    return as_ssd(fused_chunk_simple_gla, compiled=False)

def errors(op, seqlen, heads, dtype):
    problem = Problem(family=Family.SSD, level=Level.OP, batch=1, seqlen=seqlen, d_inner=64 * heads, d_state=128, headdim=64)
    family = SsdProblem()
    inputs = family.make_inputs(problem, dtype=dtype, device="cpu", seed=0)
    names = family.differentiable(problem)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(1, seqlen, heads, 64, generator=generator).to(dtype)
    grads = []
    for run, kind in ((op, dtype), (model(None), torch.float32)):
        leaves = {n: t.to(kind) if t.dtype is dtype else t.clone() for n, t in inputs.items()}
        for name in names: leaves[name].requires_grad_()
        (out,) = family.call(run, problem, leaves)
        grads.append(torch.autograd.grad(out, [leaves[n] for n in names], weights.to(out.dtype)))
    return {n: float((a.double() - b.double()).norm() / b.double().norm()) for n, a, b in zip(names, *grads)}

rows, float16, bfloat16 = [], torch.float16, torch.bfloat16
if PART == "model":
    todo = [("operands in bf16", model(bfloat16), L, 32, bfloat16) for L in (512, 2048, 8192)]
    todo += [("operands in fp32", model(None), L, 32, bfloat16) for L in (512, 2048, 8192)]
    todo += [("operands in fp16", model(float16), 512, 2, float16)]
else:
    op = fla()
    todo = [("fla, interpreted", op, L, 2, dtype) for dtype in (torch.float32, float16) for L in (128, 512)]
for what, op, seqlen, heads, dtype in todo:
    found = errors(op, seqlen, heads, dtype)
    rows.append({"what": what, "seqlen": seqlen, "heads": heads, "dtype": str(dtype).removeprefix("torch."), "relative_error": found})
    print(what, seqlen, heads, dtype, {n: f"{e:.1e}" for n, e in found.items()}, flush=True)
OUT.write_text(json.dumps(rows, indent=1) + "\n")
