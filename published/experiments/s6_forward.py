"""Check and time the Hopper selective scan: python3 s6_forward.py, from the repository's root.

Every configuration is checked in a process of its own (a failure stops no other), which also fills
the compilation cache; then everything that was right is timed here, one at a time: graph replay,
median, warm L2. Results: $RESULTS/s6_forward.json, and a table last.
"""
import importlib.util, json, os, runpy, subprocess, sys, time, traceback
from pathlib import Path

ROOT = Path.cwd()
T0 = time.time()

def S(lanes, channels, states, warps_d, tile=32, steps=8, registers=None):
    """A serial configuration with `states` of a channel in a thread, at any number of states."""
    def make(H, n):
        warps_n = max(1, H.padded_states(n) // (lanes * states))
        d = warps_d if n <= 32 else max(1, min(warps_d, 16 // warps_n))
        return H.SerialConfig(lanes=lanes, channels=channels if n <= 32 else 1, warps_n=warps_n, warps_d=d, tile=tile, steps=steps, registers=registers)
    return make


def L(**kw):
    return lambda H, n: H.Config(**kw)


CONFIGS = {
    "wide": L(),
    "1ch-wide": L(channels=1, warps=16),
    "1ch-2cta": L(channels=1, warps=8, wide=False, registers=128),
    "k4c2": S(4, 2, 4, 4),
    "k4c2s4": S(4, 2, 4, 4, steps=4),
    "k4c2w2": S(4, 2, 4, 2),
    "k4c1": S(4, 1, 4, 4, tile=64),
    "k4c1w2": S(4, 1, 4, 2),
    "k2": S(8, 1, 2, 4, tile=64),
    "k2s16": S(8, 1, 2, 4, tile=64, steps=16),
    "k2w2": S(8, 1, 2, 2),
    "k2n2": S(4, 1, 2, 2, tile=64),
    "k1n2": S(8, 1, 1, 4, tile=64),
}
ONLY_16 = ("k4c1w2", "k4c2s4", "k4c2w2", "k2", "k2s16", "k2w2", "k2n2", "k1n2", "1ch-2cta")  # not timed at larger d_state
# substitutions in the kernel's source that remove one cost each (wrong results, timed only)
B_LOAD = "B_run = gl.expand_dims(B_smem.slice(s * STEPS, STEPS, 0).load(STEP_STATE), 2)"
C_LOAD = B_LOAD.replace("B_", "C_")
FAKE = ("gl.expand_dims(gl.full([STEPS, N], 0.5, gl.float32, layout=STEP_STATE)"
        " * gl.arange(0, N, layout=gl.SliceLayout(0, STEP_STATE)).to(gl.float32)[None, :], 2)")
ABLATIONS = {
    "no decay exponentials": [("decay = gl.exp2(dt_run * gl.expand_dims(A2, 0))", "decay = dt_run * gl.expand_dims(A2, 0)")],
    "no B and C loads": [(B_LOAD, "B_run = " + FAKE), (C_LOAD, "C_run = " + FAKE)],
    "no sum over lanes": [("sum_steps_over_lanes(gl.sum(parts, 1), LANES)", "gl.sum(parts, 1)")],
    "no softplus": [("            dt = softplus(dt)\n", "            dt = dt * 0.1\n")],
}
ABLATED = ("k4c2", "k2")
# (batch, d_inner, seqlen, d_state): must, aim in ms
TARGETS = {
    (1, 2048, 2048, 16): (0.04, 0.028), (1, 2048, 8192, 16): (0.16, 0.105),
    (1, 2048, 131072, 16): (2.5, 1.7), (2, 2048, 8192, 16): (None, None),
    (4, 2048, 8192, 16): (None, None), (8, 2048, 2048, 16): (None, None),
    (8, 2048, 8192, 16): (1.0, 0.67), (1, 2048, 8192, 64): (None, None),
    (1, 2048, 8192, 128): (1.2, 0.8), (1, 2048, 8192, 256): (None, None),
}
# batch, d_inner, seqlen, ngroups, d_state, dtype, z, D, bias, softplus, checkpoint_every
CHECKS = [
    (1, 64, 2048, 1, 16, "bfloat16", 0, 1, 1, 1, None),
    (2, 32, 512, 1, 16, "bfloat16", 0, 1, 1, 1, None),
    (1, 32, 1040, 1, 128, "bfloat16", 0, 1, 1, 1, None),
]
MORE = [
    (2, 48, 1000, 2, 16, "bfloat16", 1, 1, 1, 1, 256),
    (1, 40, 1001, 1, 16, "bfloat16", 1, 1, 1, 1, 256),
    (3, 21, 777, 3, 16, "bfloat16", 0, 0, 0, 1, None),
    (2, 36, 1022, 4, 24, "bfloat16", 1, 1, 0, 1, 64),
    (1, 64, 1536, 8, 32, "bfloat16", 0, 1, 1, 1, 512),
    (1, 17, 5, 1, 16, "bfloat16", 1, 1, 1, 1, 16),
    (1, 16, 1, 1, 256, "bfloat16", 1, 1, 1, 1, 16),
    (1, 33, 1100, 1, 200, "float16", 1, 1, 1, 1, 128),
    (2, 20, 1024, 1, 16, "float16", 0, 1, 1, 0, None),
    (1, 19, 1023, 1, 16, "float32", 1, 1, 1, 1, 128),
    (1, 32, 1048, 1, 64, "float32", 1, 1, 1, 1, None),
    (1, 32, 600, 1, 256, "float32", 0, 1, 1, 1, None),
]


def load():
    runpy.run_path("mambench/_start.py")["load_package"](Path("mambench").resolve())
    import mambench
    if str(ROOT) not in mambench.__path__:
        mambench.__path__.append(str(ROOT))
    from mambench.kernels.s6 import hopper_scan
    return hopper_scan


def inputs(shape, dtype, ngroups=1, z=False, D=True, bias=True, extreme=False):
    import torch
    batch, d_inner, seqlen, d_state = shape
    r = lambda *s: torch.randn(*s, device="cuda")
    A = -torch.rand(d_inner, d_state, device="cuda") - 0.1
    A[: d_inner // 4] *= 1e-3  # channels that remember longer than the sequence
    if extreme:
        A[-1] = -80.0
    return dict(u=r(batch, d_inner, seqlen).to(dtype), delta=(r(batch, d_inner, seqlen) * (4 if extreme else 0.5)).to(dtype), A=A,
                B=r(batch, ngroups, d_state, seqlen).to(dtype), C=r(batch, ngroups, d_state, seqlen).to(dtype),
                D=r(d_inner) if D else None, z=r(batch, d_inner, seqlen).to(dtype) if z else None,
                delta_bias=r(d_inner) * 0.1 if bias else None)


def reference(t, softplus, every):
    import torch, torch.nn.functional as F
    d = {k: None if v is None else v.double() for k, v in t.items()}
    dt = d["delta"] if d["delta_bias"] is None else d["delta"] + d["delta_bias"][:, None]
    dt = F.softplus(dt, threshold=1e9) if softplus else dt
    rep = dt.shape[1] // d["B"].shape[1]
    B, C = (d[k].repeat_interleave(rep, 1) for k in "BC")
    h = torch.zeros(*dt.shape[:2], B.shape[2], device="cuda", dtype=torch.float64)
    x, ys, saved = dt * d["u"], [], []
    for i in range(dt.shape[2]):
        if every and i % every == 0:
            saved.append(h)
        h = torch.exp(dt[:, :, i, None] * d["A"]) * h + x[:, :, i, None] * B[..., i]
        ys.append((h * C[..., i]).sum(-1))
    y = torch.stack(ys, -1)
    if d["D"] is not None:
        y = y + d["u"] * d["D"][:, None]
    if d["z"] is not None:
        y = y * F.silu(d["z"])
    return y, h, torch.stack(saved, 1) if every else None


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check(name):
    """Run the checks of one configuration; print one JSON line each."""
    if name == "op":
        return check_op()
    import torch
    H = load()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    for number, case in enumerate(CHECKS + (MORE if name in ("wide", "k4c2", "k2") else [])):
        batch, d_inner, seqlen, ngroups, d_state, dtype, z, D, bias, softplus, every = case
        if name in ONLY_16 and d_state > 32:
            continue
        config = CONFIGS[name](H, d_state)
        if every and hasattr(config, "tile") and every % config.tile:
            every = config.tile
        row = dict(config=name, case=list(case))
        try:
            torch.manual_seed(number)
            t = inputs((batch, d_inner, seqlen, d_state), getattr(torch, dtype), ngroups, z, D, bias, extreme=number % 2 == 1 and bool(softplus))
            if not softplus:
                t["delta"] = t["delta"].abs() * 0.2
                t["delta_bias"] = None if t["delta_bias"] is None else t["delta_bias"].abs()  # no growth
            began = time.time()
            out, state, saved = H.scan_forward(**t, delta_softplus=bool(softplus), checkpoint_every=every, config=config)
            torch.cuda.synchronize()
            row["compile_s"] = round(time.time() - began, 1)
            want = reference(t, softplus, every)
            row["out"], row["state"] = error(out, want[0]), error(state, want[1])
            row["max"] = ((out.double() - want[0]).abs().max() / want[0].abs().max()).item()
            row["saved"] = error(saved, want[2]) if every and seqlen > every else 0.0
            limit = dict(bfloat16=3e-3, float16=5e-4, float32=1e-5)[dtype]
            row["ok"] = bool(row["out"] < limit and row["state"] < 2e-5 and row["saved"] < 2e-5)
        except Exception as exc:
            row.update(ok=False, error=f"{type(exc).__name__}: {exc}"[:1500])
        print("ROW " + json.dumps(row), flush=True)
    for d_state in (16, 64, 128, 256):  # fill the cache for the timing
        if name in ONLY_16 and d_state > 16:
            continue
        try:
            t = inputs((1, 2048, 512, d_state), torch.bfloat16)
            H.scan_forward(**t, delta_softplus=True, config=CONFIGS[name](H, d_state))
        except Exception:
            traceback.print_exc()
    torch.cuda.synchronize()


def check_op():
    """The public operation: outputs and all gradients against float64, and that none needs states."""
    import torch
    load()
    from mambench.kernels.s6 import hopper_op
    for number, shape in enumerate([(1, 48, 1040, 1, 16), (8, 2048, 96, 1, 16), (2, 20, 333, 2, 16), (1, 16, 129, 1, 128)]):
        for dtype in (torch.float32, torch.bfloat16):
            row = dict(config="op", case=[*shape, str(dtype)])
            try:
                batch, d_inner, seqlen, ngroups, d_state = shape
                torch.manual_seed(number)
                t = inputs((batch, d_inner, seqlen, d_state), dtype, ngroups, z=True)
                t["A"] = t["A"].clamp(max=-1e-2)
                t = {k: v.detach().requires_grad_() for k, v in t.items()}
                d = {k: v.detach().double().requires_grad_() for k, v in t.items()}
                got = hopper_op.selective_scan(**t, delta_softplus=True, return_last_state=True)
                want = reference(d, True, None)[:2]
                grads = [torch.randn_like(v) for v in got]
                torch.autograd.backward(got, grads)
                torch.autograd.backward(want, [g.double() for g in grads])
                row["errors"] = {k: float(f"{error(t[k].grad, d[k].grad):.1e}") for k in t}
                row["out"], row["state"] = error(got[0], want[0].detach()), error(got[1], want[1].detach())
                row["ok"] = max(*row["errors"].values(), row["out"], row["state"]) < (1e-4 if dtype == torch.float32 else 1e-2)
            except Exception as exc:
                row.update(ok=False, error=f"{type(exc).__name__}: {exc}"[:1500])
            print("ROW " + json.dumps(row), flush=True)


def ablated(name):
    """Put a copy of the kernel with one cost removed in the launcher's place of it (run these last)."""
    source = (ROOT / "kernels/s6/hopper_serial.py").read_text()
    for old, new in ABLATIONS[name]:
        if old not in source:
            raise ValueError(f"not in the source: {old}")
        source = source.replace(old, new)
    path = Path("/tmp") / ("ablated_" + name.replace(" ", "_") + ".py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    from mambench.kernels.s6 import hopper_scan
    hopper_scan.serial_scan_kernel = module.serial_scan_kernel
    hopper_scan._calls.clear()
    return hopper_scan


def timed(function):
    from triton.testing import do_bench_cudagraph
    return do_bench_cudagraph(function, rep=30, return_mode="median")


def attempt(results, key, function):
    import torch
    try:
        results[key] = function()
    except Exception as exc:
        results[key] = f"{type(exc).__name__}: {exc}"[:300]
    torch.cuda.empty_cache()


def spawn(args):
    log = open(f"/tmp/s6_{'_'.join(args).replace(' ', '_')}.log", "w+")
    return subprocess.Popen([sys.executable, __file__, *args], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT), log


def main():
    import torch
    checkers = {name: spawn(["check", name]) for name in [*CONFIGS, "op"]}
    ablators = [spawn(["ablate", name]) for name in ABLATIONS]
    H = load()
    rows, right = [], []
    for name, (process, log) in checkers.items():
        try:
            process.wait(timeout=max(5, 110 - (time.time() - T0)))
        except subprocess.TimeoutExpired:
            process.kill()
        log.seek(0)
        text = log.read()
        mine = [json.loads(l[4:]) for l in text.splitlines() if l.startswith("ROW ")]
        rows += mine
        needed = 2 if name in ONLY_16 else len(CHECKS)
        if name != "op" and len(mine) >= needed and all(r["ok"] for r in mine[:needed]):
            right.append(name)
        if process.returncode != 0 or not mine:
            rows.append(dict(config=name, ok=False, error="rc %s: %s" % (process.returncode, text[-1500:])))
    for process, _ in ablators:
        try:
            process.wait(timeout=max(1, 120 - (time.time() - T0)))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"checked after {time.time() - T0:.0f} s; right: {right}", flush=True)

    big = torch.empty(1 << 29, dtype=torch.int32, device="cuda")
    target = torch.empty_like(big)
    bandwidth = 2 * big.numel() * 4 / timed(lambda: target.copy_(big)) / 1e6  # GB/s
    del big, target
    times, floors, extras, ablations = {}, {}, {}, {}
    for shape in TARGETS:
        t = inputs(shape, torch.bfloat16)
        moved = 2 * (3 * t["u"].numel() + 2 * t["B"].numel())
        floors[str(shape)] = moved / bandwidth / 1e6
        for name in right:
            if shape[3] > 16 and name in ONLY_16:
                continue
            config = CONFIGS[name](H, shape[3])
            attempt(times, f"{name} {shape}", lambda: timed(lambda: H.scan_forward(**t, delta_softplus=True, config=config)))
    base = (1, 2048, 8192, 16)
    t = inputs(base, torch.bfloat16)

    def run(mod=H, name=None, every=None, **kw):
        config = None if name is None else CONFIGS[name](H, 16)
        return timed(lambda: mod.scan_forward(**{**t, **kw}, delta_softplus=True, checkpoint_every=every, config=config))

    def row(label, name):
        attempt(extras, f"{label} z", lambda: run(name=name, z=t["u"].clone()))
        attempt(extras, f"{label} checkpoint 64", lambda: run(name=name, every=64))
        attempt(extras, f"{label} no D, no bias", lambda: run(name=name, D=None, delta_bias=None))

    for name in ("1ch-wide", "k2"):
        row(f"B=1 {name}", name)
    for seqlen in (8190, 8191):
        t = inputs((1, 2048, seqlen, 16), torch.bfloat16)
        for name in ("wide", "k2"):
            attempt(extras, f"B=1 {name} L={seqlen}", lambda: run(name=name))
    t = inputs((8, 2048, 2048, 16), torch.bfloat16)
    row("B=8 L=2048 k4c2", "k4c2")
    for seqlen in (2046, 2047):
        t = inputs((8, 2048, seqlen, 16), torch.bfloat16)
        attempt(extras, f"B=8 k4c2 L={seqlen}", lambda: run(name="k4c2"))
    for dtype in (torch.float16, torch.float32):
        t = inputs((8, 2048, 2048, 16), dtype)
        attempt(extras, f"B=8 L=2048 k4c2 {dtype}", lambda: run(name="k4c2"))
        t = inputs(base, dtype)
        attempt(extras, f"B=1 k2 {dtype}", lambda: run(name="k2"))
    t = inputs((1, 2048, 1 << 20, 16), torch.bfloat16)
    for name in ("wide", "k2"):
        attempt(extras, f"L=1M {name}", lambda: run(name=name))

    def slices_agree():
        out = H.scan_forward(**t, delta_softplus=True)
        part = {k: v[:, -16:].contiguous() if k in ("u", "delta") else v[-16:] if k in ("A", "D", "delta_bias") else v for k, v in t.items()}
        want = H.scan_forward(**part, delta_softplus=True)
        return bool(torch.equal(out[0][:, -16:], want[0]) and torch.equal(out[1][:, -16:], want[1]))

    attempt(extras, "L=1M: last channels agree", slices_agree)
    t = inputs((1, 2048, 512, 16), torch.bfloat16)

    def eager(call):
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(300):
            call()
        spent = time.perf_counter() - began
        torch.cuda.synchronize()
        return spent / 300 * 1e3

    from mambench.kernels.s6 import hopper_op, triton_scan
    attempt(extras, "eager L=512 host ms: scan_forward", lambda: eager(lambda: H.scan_forward(**t, delta_softplus=True)))
    attempt(extras, "op", lambda: eager(lambda: hopper_op.selective_scan(**t, delta_softplus=True)))
    with_grad = {k: None if v is None else v.detach().requires_grad_() for k, v in t.items()}
    attempt(extras, "op that needs a gradient", lambda: eager(lambda: hopper_op.selective_scan(**with_grad, delta_softplus=True)))
    attempt(extras, "portable op", lambda: eager(lambda: triton_scan.selective_scan(**t, delta_softplus=True)))
    original = H.serial_scan_kernel
    for name in ABLATIONS:
        for config, shape in zip(ABLATED, ((8, 2048, 2048, 16), base)):
            t = inputs(shape, torch.bfloat16)
            attempt(ablations, f"{config} {name}", lambda: run(ablated(name), config))
    H.serial_scan_kernel = original
    H._compiled.clear()

    result = dict(device=torch.cuda.get_device_name(), bandwidth_gb_s=bandwidth, checks=rows, times_ms=times, floors_ms=floors, extras=extras, ablations=ablations)
    if os.environ.get("RESULTS"):
        Path(os.environ["RESULTS"], "s6_forward.json").write_text(json.dumps(result, indent=1))
    for r in rows:
        if not r["ok"] or r["config"] == "op":
            print({k: (f"{v:.1e}" if isinstance(v, float) else v) for k, v in r.items()})
    counts = {n: sum(r["config"] == n for r in rows) for n in [*CONFIGS, "op"]}
    print("checks passed:", {n: f"{sum(r['config'] == n and r['ok'] for r in rows)}/{c}" for n, c in counts.items()})
    for title, group in (("extras, ms", extras), (f"ablations, ms, {dict(zip(ABLATED, ((8, 2048, 2048, 16), base)))}", ablations)):
        print(title + ": " + "; ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in group.items()))
    print(f"\n{result['device']}, copy {bandwidth:.0f} GB/s; ms, graph replay, warm L2")
    print(f"{'shape':20s}" + "".join(f"{n:>10s}" for n in right) + f"{'floor':>8s}{'must':>7s}{'aim':>7s}")
    for shape, (must, aim) in TARGETS.items():
        cells = [times.get(f"{n} {shape}") for n in right]
        print(f"{str(shape):20s}" + "".join(f"{c:10.4f}" if isinstance(c, float) else f"{'-' if c is None else 'failed':>10s}" for c in cells)
              + f"{floors[str(shape)]:8.4f}{must or 0:7.3f}{aim or 0:7.3f}")
    print("failures:", [f"{k}: {v}" for k, v in times.items() if isinstance(v, str)], f"total {time.time() - T0:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        check(sys.argv[2])
    elif sys.argv[1:2] == ["ablate"]:
        import torch
        load()
        t = inputs((1, 2048, 512, 16), torch.bfloat16)
        H = ablated(sys.argv[2])
        for name in ABLATED:
            H.scan_forward(**t, delta_softplus=True, config=CONFIGS[name](H, 16))
        torch.cuda.synchronize()
    else:
        main()
