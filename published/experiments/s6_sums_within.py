"""Selective scan backward on Hopper, sums within the launch: gradients against float64, times, memory of a training step.

    OUT=folder python3 published/experiments/s6_sums_within.py      (from the repository's root, one H100, about 70 s; LIMIT in seconds)

Compiles and checks side by side, then times. Writes OUT/s6_<part>.json; a table comes last. mamba_ssm's memory, where it is installed.
"""
import gc, json, os, sys, time
from pathlib import Path

from parts import S6_NAMES as NAMES, Found, finish, graph_ms, kernels, load_package, relative, s6_prepared as prepared, s6_reference as reference, s6_tensors as tensors, start

T0 = time.time()
OUT = Path(os.environ.get("OUT", "runs/s6-sums")); OUT.mkdir(parents=True, exist_ok=True)
LIMIT = float(os.environ.get("LIMIT", 90))
# (channels, tile, warps, chunk, resident)
CONFIGS = {"w4k64": (2, 8, 4, 64, 2), "w4k32": (2, 8, 4, 32, 2), "w2k32": (2, 8, 2, 32, 4)}
FULL = [(16, "w4k64", 1), (16, "w4k64", 8), (128, "w2k32", 1), (128, "w4k32", 1), (16, "w4k64-scratch", 1), (64, "w2k32", 1), (32, "w2k32", 1)]
MUST = {(1, 2048, 16): 0.16, (1, 8192, 16): 0.6, (8, 2048, 16): 1.25, (1, 8192, 128): 4.6}


def load():
    load_package()
    from mambench.kernels.s6 import hopper_backward
    return hopper_backward


def make(H, name):
    c, t, w, k, r = CONFIGS[name.removesuffix("-scratch")]
    return H.BackwardConfig(channels=c, tile=t, warps=w, chunk=k, resident=r)


# batch, d_inner, seqlen, ngroups, d_state, dtype, z, D, bias, softplus, last-state gradient, segments, configuration
CHECKS = [
    (1, 256, 1024, 1, 16, "bfloat16", 0, 1, 1, 1, 1, None, "w4k64"),
    (9, 2048, 192, 1, 16, "bfloat16", 0, 1, 1, 1, 1, None, "w4k64"),
    (3, 192, 640, 1, 9, "float32", 0, 1, 1, 1, 1, 2, "w4k64"),
    (2, 40, 301, 2, 16, "bfloat16", 1, 1, 1, 1, 1, 3, "w4k64"),
    (2, 128, 416, 1, 16, "bfloat16", 0, 1, 1, 1, 0, 2, "w4k64"),
    (1, 36, 130, 1, 40, "bfloat16", 1, 1, 0, 1, 1, 2, "w2k32"),
    (2, 128, 200, 1, 64, "bfloat16", 0, 1, 1, 1, 1, 3, "w2k32"),
    (1, 48, 150, 1, 256, "float16", 1, 1, 1, 1, 1, 2, "w2k32"),
]


def part_check(found, wanted=None):
    import torch
    H = load()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    for number, case in enumerate(CHECKS):
        if wanted is not None and number not in wanted:
            continue
        B, D, L, G, N, dtype, z, skip, bias, softplus, last, segments, name = case

        def one():
            t, dout, dlast = tensors(B, L, N, D, getattr(torch, dtype), G, z, skip, bias, softplus, seed=number)
            dl = dlast if last else None
            config = make(H, name)
            inputs, kept = prepared(t, config.chunk, bool(softplus))
            run = lambda k: H.scan_backward(inputs.original, inputs.softplus, k, dout, dl, config=config, segments=segments)
            got, again = run(kept), run([kept.clone()])
            more = [run(kept) for _ in range(3)]
            torch.cuda.synchronize()
            want = reference(t, dout, dl, bool(softplus))
            errors = {k: relative(g, want[k]) for k, g in zip(NAMES, got) if g is not None}
            limit = dict(bfloat16=3e-3, float16=5e-4, float32=1e-5)[dtype]
            same = all(a is None or (torch.equal(a, b) and all(torch.equal(a, m[i]) for m in more)) for i, (a, b) in enumerate(zip(got, again)))
            ok = same and all(e < (limit if k not in ("A", "D", "delta_bias") else 2e-5) for k, e in errors.items())
            found.add(case=number, what=case, ok=ok, same=same, errors=errors)

        found.guarded(f"check {number} {case}", one)


class NotCooperative:
    """A kernel launched without the promise that its blocks are there at once."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        launch = self.kernel[grid]
        return lambda *a, launch_cooperative_grid=False, **k: launch(*a, **k)


def part_times(found):
    """Everything timed, the most wanted first; begins when the file `go` is there."""
    import dataclasses, torch
    H = load()
    torch.zeros(1, device="cuda")
    while not (OUT / "go").exists():
        time.sleep(0.05)
    kernel, divide = H.scan_backward_kernel, H.divide

    def ours(B, L, N, name, move=True, note="", deep=False):
        t, dout, _ = tensors(B, L, N)
        config = make(H, name)
        inputs, kept = prepared(t, config.chunk)
        call = lambda: H.scan_backward(inputs.original, inputs.softplus, [kept] if move else kept, dout, None, config=config)
        row = dict(shape=[B, L, N], who=" ".join(filter(None, [name, "" if move else "not moved", note])), ms=graph_ms(call, 8, 3))
        if deep:
            row["kernels"] = kernels(call)
        found.add(**row)

    def one(*a, **k):
        found.guarded(f"{a} {k}", ours, *a, **k)

    outputs = {}

    def same(B, L, name):
        """Three runs give the same bits, those of other variants too."""
        t, dout, dlast = tensors(B, L, 16)
        config = make(H, name)
        inputs, kept = prepared(t, config.chunk)
        got = [H.scan_backward(inputs.original, inputs.softplus, [kept.clone()] if i else kept, dout, None, config=config) for i in range(3)]
        again = all(a is None or all(torch.equal(a, g[i]) for g in got) for i, a in enumerate(got[0]))
        others = {k: max(relative(a, b) for a, b in zip(got[0], v) if a is not None) for k, v in outputs.items() if k[:2] == (B, L)}
        outputs[B, L, name + str(H.divide is divide)] = got[0]
        found.add(case=[B, L, name], what=f"against other variants: {others}", ok=again and all(e < 1e-3 for e in others.values()), same=again, errors={})

    def scratch(**kw):
        d = divide(**kw)
        return dataclasses.replace(d, in_place=False, segment_parts=1, parts=d.segments)

    def unsplit(**kw):
        d = divide(**kw)
        return dataclasses.replace(d, segment_parts=1, parts=d.segments)

    for B, L in ((1, 2048), (1, 8192), (8, 2048)):
        one(B, L, 16, "w4k64", False, deep=True)
    for L in (2048, 8192):
        one(1, L, 16, "w4k64")
    H.divide = unsplit
    for L in (2048, 8192):
        one(1, L, 16, "w4k64", False, note="adjoints by segment")
    H.divide = scratch
    for L in (2048, 8192):
        one(1, L, 16, "w4k64", False, note="scratch", deep=L == 8192)
    H.divide = divide
    for name in ("w2k32", "w4k32"):
        one(1, 8192, 128, name, False, deep=True)
    H.scan_backward_kernel = NotCooperative(kernel)
    one(1, 2048, 16, "w4k64", False, note="not cooperative")
    H.scan_backward_kernel = kernel
    for B, L in ((1, 2048), (8, 2048), (1, 8192)):
        found.guarded("same", same, B, L, "w4k64")
    H.divide = scratch
    found.guarded("same", same, 1, 2048, "w4k64")
    H.divide = divide
    outputs.clear()
    one(1, 8192, 32, "w2k32", False); one(1, 2048, 32, "w2k32", False); one(1, 8192, 64, "w2k32", False); one(8, 2048, 64, "w2k32", False)


def part_memory(found):
    import torch
    load()
    from mambench.kernels.s6.hopper_op import selective_scan
    from torch.profiler import ProfilerActivity, profile
    ops = {"ours": lambda t: selective_scan(*(t[k] for k in NAMES), delta_softplus=True)}
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        ops["mamba_ssm"] = lambda t: selective_scan_fn(*(t[k] for k in NAMES), delta_softplus=True)
    except Exception as exc:
        found.add(label="mamba_ssm", failed=str(exc)[-300:])

    def one(who, op, B, L, N):
        t, grad, _ = tensors(B, L, N)
        t = {k: None if v is None else v.requires_grad_() for k, v in t.items()}
        ins = [v for v in t.values() if v is not None]
        step = lambda: torch.autograd.grad(op(t), ins, grad)
        step(); torch.cuda.synchronize(); gc.collect(); torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
        y = op(t); torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        g = torch.autograd.grad(y, ins, grad); torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del y, g
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            step(); torch.cuda.synchronize()
        count = len([e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA])
        found.add(shape=[B, L, N], who=who, peak_MiB=round(peak / 2**20, 2), held_MiB=round(held / 2**20, 2), launches=count)

    for shape in [(1, 2048, 16), (1, 8192, 16), (8, 2048, 16), (1, 32768, 16), (2, 4000, 16), (1, 8192, 32), (1, 8192, 128)]:
        for who, op in ops.items():
            found.guarded(f"memory {who} {shape}", one, who, op, *shape)


def warm_time(N, name, B):
    """Compile what is timed, at small sizes."""
    import dataclasses, torch
    H = load()
    divide, config = H.divide, make(H, name)
    if "-scratch" in name:
        H.divide = lambda **kw: dataclasses.replace(divide(**kw), in_place=False, segment_parts=1, parts=divide(**kw).segments)
    t, dout, _ = tensors(B, 512 if B == 1 else 128, N)
    inputs, kept = prepared(t, config.chunk)
    H.scan_backward(inputs.original, inputs.softplus, kept, dout, None, config=config)
    H.scan_backward(inputs.original, inputs.softplus, [kept], dout, None, config=config)
    torch.cuda.synchronize()


def left():
    return LIMIT - (time.time() - T0)


def table(parts):
    rows = {p: json.loads(f.read_text()) for p in parts if (f := OUT / f"s6_{p}.json").exists()}
    for p, found in rows.items():
        for r in found:
            if "failed" in r:
                print(f"FAILED {p} {r['label']}: {r['failed'][-400:]}")
    checks = [r for p, found in rows.items() for r in found if "ok" in r]
    print(f"gradients: {sum(r['ok'] for r in checks)} of {len(checks)} right, the same bits in {sum(r['same'] for r in checks)}")
    for r in checks:
        if not r["ok"]:
            print("  WRONG", r["case"], r["what"], "same bits", r["same"], r["errors"])
    times = [r for p in ("times",) for r in rows.get(p, []) if "ms" in r]
    print("B, L, N | who: ms (must)")
    for shape in dict.fromkeys(tuple(r["shape"]) for r in times):
        print(f"  {shape} must {MUST.get(shape)}: " + "; ".join(f"{r['who']} {r['ms']}" for r in times if tuple(r["shape"]) == shape))
    for r in times:
        if "kernels" in r and True:
            print(f"    {r['shape']} {r['who']}: {r['kernels']}")
    print("memory of a training step: MiB at the peak (between the passes), launches")
    for shape in dict.fromkeys(tuple(r["shape"]) for r in rows.get("memory", []) if "shape" in r):
        print(f"  {shape}: " + "; ".join(f"{r['who']} {r['peak_MiB']} ({r['held_MiB']}), {r['launches']}" for r in rows["memory"] if tuple(r.get("shape", ())) == shape))


def main():
    if len(sys.argv) > 1 and sys.argv[1].startswith("part:"):
        name = sys.argv[1][5:]
        if name.startswith("check"):
            part_check(Found(OUT / f"s6_{name}.json"), [int(i) for i in name[5:].split(",")] if name[5:] else None)
        else:
            globals()["part_" + name](Found(OUT / f"s6_{name}.json"))
        return
    if len(sys.argv) > 1 and sys.argv[1].startswith("warm:"):
        N, name, B = sys.argv[1][5:].split(",")
        warm_time(int(N), name, int(B))
        return
    (OUT / "go").unlink(missing_ok=True)
    timing = start(__file__, OUT, "s6", "part:times")
    # compile and check beside each other
    made = {}
    groups = [",".join(map(str, range(i, len(CHECKS), 8))) for i in range(8)]
    made |= {f"check{g}": start(__file__, OUT, "s6", f"part:check{g}") for g in groups}
    for N, name, B in FULL:
        made[f"warm {N} {name} {B}"] = start(__file__, OUT, "s6", f"warm:{N},{name},{B}")
    deadline = time.time() + 45
    for label, process in made.items():
        finish(process, deadline - time.time(), label)
    print(f"compiled and checked after {time.time() - T0:.0f} s", flush=True)
    (OUT / "go").touch()
    finish(timing, left() - 20, "times")
    finish(start(__file__, OUT, "s6", "part:memory"), left(), "memory")
    table([*(f"check{g}" for g in groups), "times", "memory"])
    print(f"took {time.time() - T0:.0f} s")


if __name__ == "__main__":
    main()
