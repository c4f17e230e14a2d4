"""Peak memory, GPU time and gradients of training steps, ours beside mamba_ssm's, on one H100.

    python3 published/experiments/training_memory.py [PART ...]   # from the repository root, with mamba_ssm importable

About 150 s (LIMIT, seconds, ends it earlier): processes beside each other compile first, for up to 60 s. Writes
$OUT/training-memory.json as it goes; the tables come last (and once before mamba_ssm's SSD, which autotunes). Every part
survives the failure of another. `variants` and `errors` ask for windows of time, which commit 57a1637 removed: they run before it. Parts, all by default: memory ours-time errors peers variants peers-ssd
"""
import gc, json, os, subprocess, sys, time, traceback
from pathlib import Path

from parts import graph_ms, kernels, load_package, relative

T0 = time.time()
OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
LIMIT = float(os.environ.get("LIMIT", 150))
load_package()
import torch

S6 = [(1, 2048), (1, 8192), (8, 2048), (1, 32768)]
SSD = [(1, 2048), (1, 8192), (8, 2048), (1, 32768)]
MUST = {("s6", 1, 2048, 16): 0.16, ("s6", 1, 8192, 16): 0.6, ("s6", 8, 2048, 16): 1.25, ("s6", 1, 8192, 128): 4.6,
        ("ssd", 1, 2048, 128): 0.16, ("ssd", 1, 8192, 128): 0.4, ("ssd", 8, 2048, 128): 0.7}
FOUND = {"rows": [], "variants": {}, "errors": {}, "failures": []}


def left():
    return LIMIT - (time.time() - T0)


WARMING = len(sys.argv) > 1 and sys.argv[1].startswith("warm:")


def save():
    if WARMING:
        return
    (OUT / "training-memory.json").write_text(json.dumps(FOUND, indent=1, default=str))


def guarded(label, function, *args, **kw):
    if left() < 3:
        FOUND["failures"].append(f"{label}: no time left"); return None
    try:
        return function(*args, **kw)
    except Exception as exc:
        FOUND["failures"].append(f"{label}: {type(exc).__name__}: {str(exc)[-400:]}")
        if "illegal" in str(exc) or "unspecified" in str(exc):
            traceback.print_exc()
        return None
    finally:
        gc.collect()
        try:
            torch.cuda.empty_cache()
        except Exception:
            pass
        save()


def s6_inputs(B, L, N=16, D=2048, dtype=torch.bfloat16, z=False, G=1, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, device="cuda")
    A = -torch.rand(D, N, generator=g, device="cuda") - 0.1; A[: D // 4] *= 1e-3
    t = dict(u=r(B, D, L).to(dtype), delta=(r(B, D, L) * 0.5).to(dtype), A=A, B=r(B, G, N, L).to(dtype), C=r(B, G, N, L).to(dtype), D=r(D),
             z=r(B, D, L).to(dtype) if z else None, delta_bias=r(D).abs() * 0.1)
    return {k: None if v is None else v.requires_grad_() for k, v in t.items()}, r(B, D, L).to(dtype)


def ssd_inputs(B, L, H=32, P=64, N=128, dtype=torch.bfloat16, z=False, G=1, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, device="cuda")
    t = dict(x=r(B, L, H, P).to(dtype), dt=r(B, L, H).to(dtype), A=-torch.rand(H, generator=g, device="cuda") * 8 - 0.5, B=r(B, L, G, N).to(dtype),
             C=r(B, L, G, N).to(dtype), D=r(H), z=r(B, L, H, P).to(dtype) if z else None, dt_bias=r(H) - 4)
    return {k: None if v is None else v.requires_grad_() for k, v in t.items()}, r(B, L, H, P).to(dtype)


def ours(family):
    if family == "s6":
        from mambench.kernels.s6.hopper_op import selective_scan
        return lambda t: selective_scan(t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["delta_bias"], delta_softplus=True)
    from mambench.kernels.ssd.hopper_op import ssd
    return lambda t: ssd(t["x"], t["dt"], t["A"], t["B"], t["C"], 256, D=t["D"], z=t["z"], dt_bias=t["dt_bias"], dt_softplus=True)


def peer(family):
    if family == "s6":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        return lambda t: selective_scan_fn(t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["delta_bias"], delta_softplus=True)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    return lambda t: mamba_chunk_scan_combined(t["x"], t["dt"], t["A"], t["B"], t["C"], 256, D=t["D"], z=t["z"], dt_bias=t["dt_bias"], dt_softplus=True)


def step(op, t, grad):
    y = op(t)
    return y, torch.autograd.grad(y, [v for v in t.values() if v is not None], grad)


def peak(op, t, grad):
    """MiB beside the inputs at the peak of forward + backward, of forward, and held between."""
    step(op, t, grad); torch.cuda.synchronize(); gc.collect(); torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
    y = op(t); torch.cuda.synchronize()
    fwd, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    g = torch.autograd.grad(y, [v for v in t.values() if v is not None], grad); torch.cuda.synchronize()
    whole = torch.cuda.max_memory_allocated() - before
    del y, g
    return [round(v / 2**20, 2) for v in (whole, fwd, held)]


def launches(op, t, grad):
    from torch.profiler import ProfilerActivity, profile
    step(op, t, grad); torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        step(op, t, grad); torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return len([e for e in p.events() if e.device_type == device])


def events(function, rep=12):
    """Median milliseconds by events around eager calls, after a spin that hides the host."""
    for _ in range(3):
        function()
    times = []
    for _ in range(rep):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(30_000_000); a.record(); function(); b.record(); b.synchronize(); times.append(a.elapsed_time(b))
    return round(sorted(times)[len(times) // 2], 4)


def backward_time(op, t, grad):
    """The whole backward as autograd runs it, the graph retained: events, and the sum of its kernels' times."""
    y = op(t)
    ins = [v for v in t.values() if v is not None]
    run = lambda: torch.autograd.grad(y, ins, grad, retain_graph=True)
    return {"events": events(run), "kernels": kernels(run)}


def one(family, B, L, N, who, *, timing):
    t, grad = (s6_inputs(B, L, N) if family == "s6" else ssd_inputs(B, L, N=N))
    op = (ours if who == "ours" else peer)(family)
    row = {"family": family, "B": B, "L": L, "N": N, "who": who}
    FOUND["rows"].append(row)
    row["peak"], row["forward_peak"], row["held"] = peak(op, t, grad)
    if who == "ours":
        row["launches"] = launches(op, t, grad)
    if timing:
        row |= backward_time(op, t, grad)
        row["kernel_ms"] = round(sum(v[0] for v in row["kernels"].values()) / 1e3, 4)


def configurations(N):
    from mambench.kernels.s6 import hopper_backward as H
    C = H.BackwardConfig
    if N == 16:
        return {"w4k64x2": C(warps=4, chunk=64, resident=2), "w2k64x4": C(warps=2, chunk=64, resident=4)}
    return {"w4k32x2": C(warps=4, chunk=32, resident=2)}


def s6_variants(B, L, N, only=None, time=lambda call: graph_ms(call, 10, 4)):
    """The s6 backward by graph replay: blocks of 32 or 64 channels, windows, states moved into du or not."""
    from mambench.kernels.s6 import hopper_backward as H, hopper_scan, triton_scan
    t, dout = s6_inputs(B, L, N)
    t = {k: None if v is None else v.detach() for k, v in t.items()}
    for name, config in configurations(N).items():
        if only not in (None, name):
            continue
        kept = hopper_scan.scan_forward(**t, delta_softplus=True, checkpoint_every=config.chunk)[2]
        inputs = triton_scan._Inputs(*(t[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")), True)
        for windows in (1, 2, 3):
            for move in ((False, True) if N == 16 else (False,)):
                key = f"s6 {B},{L},{N} {name} windows={windows} move={move}"
                if left() < 8:
                    return
                run = lambda: H.scan_backward(inputs.original, inputs.softplus, [kept] if move else kept, dout, None, config=config, windows=windows)
                FOUND["variants"][key] = guarded(key, time, run, 8)


def ssd_variants():
    """The walk that turns states into their gradients: the state a chunk ahead in registers (as committed), or loaded where it is used."""
    import importlib.util
    from mambench.kernels.ssd import triton_parts as parts
    text = Path(parts.__file__).read_text()
    a = text.index("    if REVERSE and CHUNK_STATES:  # a chunk ahead"); b = text.index("    for k in tl.range(0, count, num_stages=STAGES):", a)
    late = text[:a] + text[b:]
    a = late.index("                more = tile_mask & (k + 1 < count)"); b = late.index("            kept = state.to(", a)
    late = late[:a] + late[b:]
    old = "                product = tl.sum(tl.sum(ahead.to(tl.float32) * state, 1), 0)"
    assert old in late
    late = late.replace(old, "                ahead = tl.load(chunk_states_ptr + slot + tile, mask=tile_mask, other=0.0)\n" + old)
    path = OUT / "late_parts.py"; path.write_text(late)
    spec = importlib.util.spec_from_file_location("late_parts", path); made = importlib.util.module_from_spec(spec)
    sys.modules["late_parts"] = made; spec.loader.exec_module(made)
    kernel = parts.state_kernel
    for B, L in ((1, 2048), (1, 8192), (8, 2048)):
        t, grad = ssd_inputs(B, L)
        for name, each in (("ahead", kernel), ("late", made.state_kernel)):
            if left() < 8:
                return
            parts.state_kernel = each
            try:
                found = guarded(f"ssd {name}", backward_time, ours("ssd"), t, grad)
            finally:
                parts.state_kernel = kernel
            if found:
                FOUND["variants"][f"ssd {B},{L} {name}"] = {"events": found["events"], "kernels_ms": round(sum(v[0] for v in found["kernels"].values()) / 1e3, 4), **found["kernels"]}


def s6_reference(t, dout):
    import torch.nn.functional as F
    d = {k: None if v is None else v.detach().double().requires_grad_() for k, v in t.items()}
    dt = F.softplus(d["delta"] + d["delta_bias"][:, None], threshold=1e9)
    B, C = (d[k].repeat_interleave(dt.shape[1] // d["B"].shape[1], 1) for k in "BC")
    h = torch.zeros(*dt.shape[:2], B.shape[2], device="cuda", dtype=torch.float64)
    x, ys = dt * d["u"], []
    for i in range(dt.shape[2]):
        h = torch.exp(dt[:, :, i, None] * d["A"]) * h + x[:, :, i, None] * B[..., i]
        ys.append((h * C[..., i]).sum(-1))
    y = torch.stack(ys, -1) + d["u"] * d["D"][:, None]
    y = y if d["z"] is None else y * F.silu(d["z"])
    return torch.autograd.grad(y, [v for v in d.values() if v is not None], dout.double())


def ssd_reference(t, dout):
    import torch.nn.functional as F
    d = {k: None if v is None else v.detach().double().requires_grad_() for k, v in t.items()}
    dt = F.softplus(d["dt"] + d["dt_bias"], threshold=1e9)
    H = dt.shape[2]
    B, C = (d[k].repeat_interleave(H // d["B"].shape[2], 2) for k in "BC")
    h = torch.zeros(dt.shape[0], H, d["x"].shape[3], B.shape[3], device="cuda", dtype=torch.float64)
    ys = []
    for i in range(dt.shape[1]):
        h = torch.exp(dt[:, i] * d["A"])[..., None, None] * h + (dt[:, i, :, None] * d["x"][:, i])[..., None] * B[:, i, :, None, :]
        ys.append((h * C[:, i, :, None, :]).sum(-1))
    y = torch.stack(ys, 1) + d["x"] * d["D"][:, None]
    y = y if d["z"] is None else y * F.silu(d["z"])
    return torch.autograd.grad(y, [v for v in d.values() if v is not None], dout.double())


def s6_errors(label, windows, sizes, dtype=torch.bfloat16, z=False, G=1):
    """Gradients through the operation against float64, with the windows that only long scans have."""
    from mambench.kernels.s6 import hopper_backward as H
    B, L, N, D = sizes
    t, grad = s6_inputs(B, L, N, D, dtype, z, G)
    original = H.divide
    H.divide = lambda **kw: original(**{**kw, "windows": windows})
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    try:
        got = step(ours("s6"), t, grad)[1]
        again = step(ours("s6"), t, grad)[1]
        y = ours("s6")(t)
        ins = [v for v in t.values() if v is not None]
        first = torch.autograd.grad(y, ins, grad, retain_graph=True); second = torch.autograd.grad(y, ins, grad)
    finally:
        H.divide = original
        torch.use_deterministic_algorithms(False)
    want = s6_reference(t, grad)
    names = [k for k, v in t.items() if v is not None]
    FOUND["errors"][label] = {"same": all(torch.equal(a, b) and torch.equal(a, c) and torch.equal(a, d) for a, b, c, d in zip(got, again, first, second)),
                              **{k: relative(a, b) for k, a, b in zip(names, got, want)}}


def ssd_errors(label, sizes, z=False, G=1, dtype=torch.bfloat16):
    B, L, H, P, N = sizes
    t, grad = ssd_inputs(B, L, H, P, N, dtype, z, G)
    torch.use_deterministic_algorithms(True)
    try:
        got = step(ours("ssd"), t, grad)[1]; again = step(ours("ssd"), t, grad)[1]
    finally:
        torch.use_deterministic_algorithms(False)
    want = ssd_reference(t, grad)
    names = [k for k, v in t.items() if v is not None]
    FOUND["errors"][label] = {"same": all(torch.equal(a, b) for a, b in zip(got, again)), **{k: relative(a, b) for k, a, b in zip(names, got, want)}}


def table():
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; MiB beside the inputs; backward in ms: events (eager, host hidden), kernels' sum")
    by = {}
    for r in FOUND["rows"]:
        by.setdefault((r["family"], r["B"], r["L"], r["N"]), {})[r["who"]] = r
    print("case | ours peak | peer peak | ratio | ours fwd / held | peer held | launches | ours bwd events, kernels | must | peer bwd")
    for k, v in by.items():
        o, p = v.get("ours", {}), v.get("mamba_ssm", {})
        ratio = round(o["peak"] / p["peak"], 3) if o.get("peak") and p.get("peak") else None
        print(k, "|", o.get("peak"), "|", p.get("peak"), "|", ratio, "|", o.get("forward_peak"), "/", o.get("held"), "|", p.get("held"), "|", o.get("launches"),
              "|", o.get("events"), o.get("kernel_ms"), "|", MUST.get(k), "|", p.get("events"), p.get("kernel_ms"))
    for k, v in by.items():
        if "kernels" in v.get("ours", {}):
            print("  ", k, v["ours"]["kernels"])
    print("\ns6 backward variants, graph replay, ms")
    for k, v in FOUND["variants"].items():
        print(f"  {k}: {v}")
    print("\nrelative errors against float64")
    for k, v in FOUND["errors"].items():
        print(f"  {k}: {v}")
    for f in FOUND["failures"]:
        print("FAILED", f)
    print(f"took {time.time() - T0:.0f} s")


def errors_s6():
    for windows in (1, 3):
        guarded("s6 bf16", s6_errors, f"s6 bf16 1x1024x16x128 windows={windows}", windows, (1, 1024, 16, 128))
    guarded("s6 gated", s6_errors, "s6 bf16 gated 2x334x16x64 G=2 windows=2", 2, (2, 334, 16, 64), z=True, G=2)
    guarded("s6 fp32", s6_errors, "s6 fp32 1x448x20x40 windows=2", 2, (1, 448, 20, 40), dtype=torch.float32)
    guarded("s6 128", s6_errors, "s6 bf16 1x512x128x64 windows=2", 2, (1, 512, 128, 64))


def errors_ssd():
    guarded("ssd", ssd_errors, "ssd bf16 2x700x4x64x128", (2, 700, 4, 64, 128))
    guarded("ssd gated", ssd_errors, "ssd bf16 gated 1x600x8x64x128 G=2", (1, 600, 8, 64, 128), z=True, G=2)


def once(run, rep):
    run(); torch.cuda.synchronize(); return 0.0


WARM = {
    "w4k64x2": lambda: s6_variants(1, 2048, 16, "w4k64x2", once), "w2k64x4": lambda: s6_variants(1, 2048, 16, "w2k64x4", once),
    "w4k32x2": lambda: s6_variants(1, 2048, 128, "w4k32x2", once), "errors_s6": errors_s6, "errors_ssd": errors_ssd,
    "ours_s6": lambda: peak(ours("s6"), *s6_inputs(1, 2048)), "ours_s6_long": lambda: peak(ours("s6"), *s6_inputs(1, 8192)),
    "ours_s6_many": lambda: peak(ours("s6"), *s6_inputs(8, 2048)), "ours_s6_128": lambda: peak(ours("s6"), *s6_inputs(1, 2048, 128)),
    "ours_ssd": lambda: [peak(ours("ssd"), *ssd_inputs(B, L)) for B, L in ((1, 2048), (8, 2048))],
    "ssd_variants": ssd_variants, "peer_ssd": lambda: peak(peer("ssd"), *ssd_inputs(1, 2048)),
}


def warm():
    """Compile everything in processes of their own; whoever is not done after 60 s goes on."""
    env = dict(os.environ, OMP_NUM_THREADS="1", LIMIT="100")
    made = {name: subprocess.Popen([sys.executable, __file__, f"warm:{name}"], env=env, stdout=subprocess.DEVNULL, stderr=open(OUT / f"warm_{name}.txt", "w"))
            for name in WARM}
    deadline = time.time() + 60
    for name, process in made.items():
        if name != "peer_ssd":
            try:
                process.wait(timeout=max(0.1, deadline - time.time()))
            except subprocess.TimeoutExpired:
                pass
    print(f"warm after {time.time() - T0:.0f} s", {n: p.poll() for n, p in made.items()}, flush=True)
    return made["peer_ssd"]


def main():
    if WARMING:
        WARM[sys.argv[1][5:]](); return
    parts = sys.argv[1:] or ["memory", "ours-time", "errors", "peers", "variants", "peers-ssd"]
    cases = [("s6", B, L, 16) for B, L in S6] + [("s6", 1, 8192, 128)] + [("ssd", B, L, 128) for B, L in SSD]
    behind = warm()
    try:
        if "memory" in parts:
            for c in cases:
                guarded(f"ours {c}", one, *c, "ours", timing="ours-time" in parts and c[2] <= 8192)
        if "errors" in parts:
            errors_s6(); errors_ssd()
        if "peers" in parts:
            for c in cases:
                if c[0] == "s6":
                    guarded(f"mamba_ssm {c}", one, *c, "mamba_ssm", timing=c[1] == 1 and c[2] <= 8192)
        if "variants" in parts:
            guarded("ssd variants", ssd_variants)
            for c in ((1, 2048, 16), (1, 8192, 16), (8, 2048, 16), (1, 8192, 128)):
                guarded(f"variants {c}", s6_variants, *c)
        save(); table()
        if "peers-ssd" in parts:
            try:
                behind.wait(timeout=max(0.1, left() - 40))
            except subprocess.TimeoutExpired:
                pass
            for c in cases:
                if c[0] == "ssd" and left() > 20:
                    guarded(f"mamba_ssm {c}", one, *c, "mamba_ssm", timing=c[1] == 1 and c[2] <= 8192)
            save(); table()
    finally:
        if behind.poll() is None:
            behind.kill()


if __name__ == "__main__":
    main()
