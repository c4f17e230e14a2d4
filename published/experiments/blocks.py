"""Whole blocks' training step, fused and plain, kernel by kernel; and the kernels around mixers.

    python published/experiments/blocks.py OUT.json

Times are of torch.profiler's kernels, added up, and of CUDA-graph replays; kept is what a forward
holds for its backward, peak what a step holds at most, beside weights, gradients' inputs and x.
"""

import gc
import json
import runpy
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    runpy.run_path(str(ROOT / "mambench/_start.py"))["load_package"](ROOT / "mambench")

import torch  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from mambench.harness.spec import Family, Level, Problem  # noqa: E402
from mambench.implementations.blocks import problem as blocks  # noqa: E402
from mambench.kernels.conv import triton_conv  # noqa: E402
from mambench.kernels.norm import triton_norm  # noqa: E402

BF16, CUDA, D_MODEL = torch.bfloat16, "cuda", 2048
SHAPES = ((1, 8192), (1, 2048), (2, 2048), (8, 2048))
ATTENTION = ("fa4", "sdpa-cudnn", "sdpa-flash")
Mixers = dict[Family, tuple[str, object]]


def mixers() -> Mixers:
    """Return the variant and the operation of every family; of attention the first that works."""
    from mambench.implementations.ops.flash_attention import FlashAttention
    from mambench.kernels.s6.hopper_op import selective_scan
    from mambench.kernels.ssd.hopper_op import ssd

    found: Mixers = {Family.SSD: ("hopper", ssd), Family.S6: ("hopper", selective_scan)}
    for variant in ATTENTION:
        try:
            op = FlashAttention().op(Family.ATTENTION, variant)
            q = torch.randn(1, 256, 2, 128, device=CUDA, dtype=BF16, requires_grad=True)
            op(q, q, q).sum().backward()
        except Exception as error:
            print(f"attention {variant}: {type(error).__name__}: {error}"[:200])
            continue
        found[Family.ATTENTION] = (variant, op)
        break
    return found


def problem(family: Family, batch: int, seqlen: int) -> Problem:
    """Return a block-level problem as the suite `training` has it."""
    attention = family is Family.ATTENTION
    return Problem(
        family=family,
        level=Level.BLOCK,
        batch=batch,
        seqlen=seqlen,
        d_model=D_MODEL,
        d_inner=D_MODEL if attention else 2 * D_MODEL,
        headdim={Family.S6: None, Family.SSD: 64, Family.ATTENTION: 128}[family],
        d_state={Family.S6: 16, Family.SSD: 128, Family.ATTENTION: None}[family],
        ngroups=None if attention else 1,
    )


def kernels(call, times=3):
    """Return the kernels of a call: milliseconds, launches and name, the longest first."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            entry = found.setdefault(event.name[:160], [0.0, 0.0])
            entry[0] += event.device_time / 1e3 / times
            entry[1] += 1 / times
    return sorted(([ms, count, name] for name, (ms, count) in found.items()), reverse=True)


def replayed_ms(call, times=10):
    """Return the milliseconds of a graph replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    del kept
    return begin.elapsed_time(end) / times


def block(family, variant, op, batch, seqlen, fused):
    """Measure a stack's training step."""
    asked = problem(family, batch, seqlen)
    judge = blocks.block_family(asked)
    names = judge.differentiable(asked)
    inputs = judge.make_inputs(asked, dtype=BF16, device=CUDA, seed=0)
    leaves = {n: v.requires_grad_(n in names) for n, v in inputs.items()}
    stack = blocks._Bindable(blocks._skeleton(asked, op, torch.float32, fused=fused)).bind(leaves)
    wanted = [leaves[name] for name in names]
    grad = torch.randn_like(leaves["x"].detach())

    def forward():
        return stack(leaves["x"], *blocks._tables(leaves))

    def step():
        return torch.autograd.grad(forward(), wanted, grad)

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del made
    y = forward()
    kept = torch.cuda.memory_allocated() - before
    del y
    begin = time.perf_counter()
    step()
    host_s = time.perf_counter() - begin
    torch.cuda.synchronize()
    graph_ms = replayed_ms(step)
    return {
        "family": family.value, "variant": variant, "batch": batch, "seqlen": seqlen,
        "fused": fused, "graph_ms": graph_ms, "host_ms": host_s * 1e3,
        "tokens_per_s": batch * seqlen / graph_ms * 1e3, "peak_bytes": peak, "kept_bytes": kept,
        "forward_kernels": kernels(forward), "kernels": kernels(step),
    }  # fmt: skip


def operations(seqlen):
    """Measure convolution and norms at the sizes of one sequence's blocks; yields records."""

    def normal(*shape):
        return torch.randn(*shape, device=CUDA).to(BF16)

    def record(name, call, moved):
        ms = sum(entry[0] for entry in kernels(call, 5))
        return {"name": name, "seqlen": seqlen, "ms": ms, "gb_per_s": moved / ms / 1e6}

    inner = 2 * D_MODEL
    x, weight, bias = normal(1, inner, seqlen), normal(4, inner).T, normal(inner)
    size = 2 * x.numel()
    dout, more = normal(1, inner, seqlen), normal(1, inner, seqlen)
    conv, back = triton_conv.conv_forward, triton_conv.conv_backward
    yield record("conv, time", lambda: conv(x, weight, bias, True), 2 * size)
    yield record(
        "conv, time, backward of two gradients",
        lambda: back(x, weight, bias, (dout,), True, more=more), 4 * size,
    )  # fmt: skip
    widths = (inner, 128, 128)
    rows, place = normal(1, seqlen, 8512), normal(1, seqlen, 8512)
    mixed, into = (t[..., inner : inner + sum(widths)].mT for t in (rows, place))
    weight, bias = normal(4, sum(widths)).T, normal(sum(widths))
    ranges = tuple(normal(1, seqlen, width).mT for width in widths)
    size = 2 * mixed.numel()
    yield record("conv, channels", lambda: conv(mixed, weight, bias, True), 2 * size)
    yield record(
        "conv, channels, backward",
        lambda: back(mixed, weight, bias, ranges, True, dx=into), 3 * size,
    )  # fmt: skip
    for gated, width in ((False, D_MODEL), (True, inner)):
        h, scale, size = normal(seqlen, width), normal(width), 2 * seqlen * width
        z, dz = (rows[0, :, :inner], place[0, :, :inner]) if gated else (None, None)
        residual, grad = None if gated else h, normal(seqlen, width)
        _, rstd = triton_norm.norm_forward(h, scale, z, 1e-5)
        name = "gated norm" if gated else "norm"
        yield record(
            name,
            lambda h=h, s=scale, z=z: triton_norm.norm_forward(h, s, z, 1e-5), (2 + gated) * size,
        )  # fmt: skip
        yield record(
            f"{name}, backward",
            lambda h=h, s=scale, z=z, dz=dz, rstd=rstd, r=residual, g=grad: (
                triton_norm.norm_backward(h, s, z, rstd, g, residual=r, dz=dz, give_out=True)
            ),
            (5 + gated) * size,
        )


def main(path: Path) -> None:
    """Measure everything; what fails is named and left out."""
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found |= {"blocks": [], "operations": [], "failed": []}
    plans = [(f, v, op, b, n, True) for f, (v, op) in mixers().items() for b, n in SHAPES]
    plans += [(f, v, op, 1, 8192, False) for f, (v, op) in mixers().items()]
    for plan in plans:
        try:
            made = block(*plan)
        except Exception as error:
            found["failed"].append(f"{plan[0]} {plan[3:]}: {error}"[:300])
            traceback.print_exc()
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        found["blocks"].append(made)
        print(
            f"{made['family']:9s} {made['variant']:10s} {'fused' if made['fused'] else 'plain'} "
            f"B={made['batch']} L={made['seqlen']:5d} graph {made['graph_ms']:7.3f} ms "
            f"kernels {sum(k[0] for k in made['kernels']):7.3f} ms "
            f"{sum(k[1] for k in made['kernels']):4.0f} launches, host {made['host_ms']:5.2f} ms "
            f"{made['tokens_per_s'] / 1e3:6.0f} k tokens/s "
            f"peak {made['peak_bytes'] / 2**20:5.0f} MiB kept {made['kept_bytes'] / 2**20:5.0f}",
            flush=True,
        )
        path.write_text(json.dumps(found, indent=1))
    for seqlen in (2048, 8192):
        for made in operations(seqlen):
            found["operations"].append(made)
            print(f"{made['name']:40s} L={seqlen} {made['ms'] * 1e3:7.1f} us "
                  f"{made['gb_per_s']:5.0f} GB/s", flush=True)  # fmt: skip
    path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
