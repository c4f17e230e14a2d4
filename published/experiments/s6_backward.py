"""Check and time the Hopper selective scan's backward: python3 s6_backward.py, from the repository's root.

Every configuration is compiled and checked in a process of its own (against float64 autograd and the portable backward);
what was right is then timed here, one at a time: graph replay, median, warm L2. Results: $OUT/gpu_s6_backward.json and a table.
"""
import json, os, subprocess, sys, time
from pathlib import Path

from parts import S6_NAMES as NAMES, load_package, relative, s6_prepared, s6_reference as reference

ROOT, T0 = Path.cwd(), time.time()
OUT = Path(os.environ.get("OUT", "/tmp/out"))
LIMIT_CHECK = float(os.environ.get("LIMIT_CHECK", 75))
LIMIT_ALL = float(os.environ.get("LIMIT_ALL", 185))


def load():
    load_package()
    from mambench.kernels.s6 import hopper_backward
    return hopper_backward


# name: (channels, tile, warps, chunk, resident, registers)
CONFIGS = {
    "c2t8w4k64": (2, 8, 4, 64, 2, None),
    "c2t8w4k64x4": (2, 8, 4, 64, 4, None),
    "c2t8w8k64": (2, 8, 8, 64, 1, None),
    "c2t8w2k64": (2, 8, 2, 64, 4, None),
    "c2t8w4k32": (2, 8, 4, 32, 2, None),
    "c2t4w4k32r168": (2, 4, 4, 32, 3, 168),
    "c2t4w2k32r168": (2, 4, 2, 32, 6, 168),
    "c2t4w2k64r168": (2, 4, 2, 64, 3, 168),
    "c2t4w4k32r128": (2, 4, 4, 32, 3, 128),
    "c2t8w4k32r168": (2, 8, 4, 32, 3, 168),
    "c4t4w2k32": (4, 4, 2, 32, 3, None),
    "c4t4w4k32": (4, 4, 4, 32, 1, None),
}
LARGE_N = ("c2t8w2k64", "c2t8w4k64", "c2t8w4k32", "c2t4w4k32r168", "c2t4w2k64r168", "c4t4w2k32")
# (batch, d_inner, seqlen, d_state): must, aim in ms
TARGETS = {
    (1, 2048, 2048, 16): (0.16, 0.12), (1, 2048, 8192, 16): (0.6, 0.45), (8, 2048, 2048, 16): (1.25, 0.8),
    (1, 2048, 8192, 128): (4.6, 3.5), (1, 2048, 131072, 16): (None, None),
}
# batch, d_inner, seqlen, ngroups, d_state, dtype, z, D, bias, softplus, last-state gradient, segments
CHECKS = [
    (1, 128, 512, 1, 16, "bfloat16", 0, 1, 1, 1, 0, 4),
    (2, 40, 301, 2, 16, "bfloat16", 1, 1, 1, 1, 1, 3),
    (1, 36, 130, 1, 40, "bfloat16", 1, 1, 0, 1, 1, 2),
    (1, 64, 256, 1, 128, "bfloat16", 0, 1, 1, 1, 0, 2),
    (2, 24, 100, 1, 16, "float16", 0, 0, 0, 0, 1, None),
    (1, 33, 67, 1, 20, "float32", 1, 1, 1, 1, 1, None),
    (1, 17, 1, 1, 16, "float32", 0, 1, 1, 1, 0, None),
]


def make(H, name):
    channels, tile, warps, chunk, resident, registers = CONFIGS[name]
    return H.BackwardConfig(channels=channels, tile=tile, warps=warps, chunk=chunk, resident=resident, registers=registers)


def tensors(shape, dtype, ngroups=1, z=False, D=True, bias=True, softplus=True):
    import torch
    batch, d_inner, seqlen, d_state = shape
    r = lambda *s: torch.randn(*s, device="cuda")
    A = -torch.rand(d_inner, d_state, device="cuda") - 0.1
    A[: d_inner // 4] *= 1e-3
    delta = r(batch, d_inner, seqlen) * 0.5
    t = dict(u=r(batch, d_inner, seqlen).to(dtype), delta=(delta if softplus else delta.abs() * 0.2).to(dtype), A=A,
             B=r(batch, ngroups, d_state, seqlen).to(dtype), C=r(batch, ngroups, d_state, seqlen).to(dtype), D=r(d_inner) if D else None,
             z=r(batch, d_inner, seqlen).to(dtype) if z else None, delta_bias=r(d_inner).abs() * 0.1 if bias else None)
    return t, r(batch, d_inner, seqlen).to(dtype), r(batch, d_inner, d_state)


def say(row):
    print("ROW " + json.dumps(row), flush=True)


def check(name):
    """Run the checks of one configuration ("portable": of the portable backward)."""
    import torch
    H = load()
    from mambench.kernels.s6 import triton_config, triton_scan
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    config = None if name == "portable" else make(H, name)
    for number, case in enumerate(CHECKS):
        batch, d_inner, seqlen, ngroups, d_state, dtype, z, D, bias, softplus, last, segments = case
        if config and d_state > 16 and name not in LARGE_N:
            continue
        row = dict(config=name, case=number)
        try:
            torch.manual_seed(number)
            t, dout, dlast = tensors((batch, d_inner, seqlen, d_state), getattr(torch, dtype), ngroups, z, D, bias, softplus)
            dlast = dlast if last else None
            began = time.time()
            if config is None:
                inputs, kept = s6_prepared(t, triton_config.chunk_size(d_state), bool(softplus))
                run = lambda: triton_scan.scan_backward(inputs, kept, dout, dlast)
            else:
                inputs, kept = s6_prepared(t, config.chunk, bool(softplus))
                run = lambda: H.scan_backward(inputs.original, inputs.softplus, kept, dout, dlast, config=config, segments=segments)
            got = run()
            torch.cuda.synchronize()
            row["first_s"] = round(time.time() - began, 1)
            again = run()
            row["same_bits"] = all(a is None or torch.equal(a, b) for a, b in zip(got, again))
            want = reference(t, dout, dlast, bool(softplus))
            row["errors"] = {k: relative(g, want[k]) for k, g in zip(NAMES, got) if g is not None}
            limit = dict(bfloat16=3e-3, float16=5e-4, float32=1e-5)[dtype]
            row["ok"] = row["same_bits"] and all(e < (limit if k not in ("A", "D", "delta_bias") else 2e-5) for k, e in row["errors"].items())
        except Exception as exc:
            row.update(ok=False, error=f"{type(exc).__name__}: {exc}"[-1500:])
        say(row)
    for shape in TARGETS:  # fill the cache for the timing
        if shape[2] > 8192 or (shape[3] > 16 and name not in (*LARGE_N, "portable")) or shape[0] > 1:
            continue
        try:
            t, dout, _ = tensors((1, 2048, 512, shape[3]), torch.bfloat16)
            if config is not None:
                inputs, kept = s6_prepared(t, config.chunk, True)
                H.scan_backward(inputs.original, inputs.softplus, kept, dout, None, config=config, segments=2)
        except Exception as exc:
            say(dict(config=name, case="warm", ok=False, error=f"{type(exc).__name__}: {exc}"[:500]))
    torch.cuda.synchronize()
    print("DONE", flush=True)


def timed(function, rep=20):
    from triton.testing import do_bench_cudagraph
    return do_bench_cudagraph(function, rep=rep, return_mode="median")


def parts(function):
    """GPU time of each kernel of one call, microseconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    function(); torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5):
            function()
        torch.cuda.synchronize()
    return {e.key[:40]: round(e.device_time_total / 5, 1) for e in p.key_averages() if e.device_time_total}


def main():
    import torch
    OUT.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    processes = {}
    for name in [*CONFIGS, "portable"]:
        log = open(f"/tmp/s6b_{name}.log", "w+")
        processes[name] = subprocess.Popen([sys.executable, __file__, "check", name], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=env), log
    H = load()
    from mambench.kernels.s6 import triton_config, triton_scan
    rows, right = [], {}
    for name, (process, log) in processes.items():
        try:
            process.wait(timeout=max(1, LIMIT_CHECK - (time.time() - T0)))
        except subprocess.TimeoutExpired:
            process.kill(); process.wait()
        log.seek(0)
        text = log.read()
        mine = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]
        rows += mine
        right[name] = [r["case"] for r in mine if r["ok"]]
        bad = [r for r in mine if not r["ok"]][:3]
        if "DONE" not in text or not mine:
            rows.append(dict(config=name, ok=False, error="rc %s: %s" % (process.returncode, text[-1200:])))
        print(f"{name}: right {right[name]}" + "".join(f"\n   WRONG {r.get('case')} {r.get('errors', '')} {r.get('error', '')[-260:]} bits {r.get('same_bits')}" for r in bad)
              + ("" if "DONE" in text else f"\n   not done: {text[-300:]}"), flush=True)
    print(f"checked after {time.time() - T0:.0f} s", flush=True)
    times, breakdown, info = {}, {}, {}

    def save():
        (OUT / "gpu_s6_backward.json").write_text(json.dumps(dict(device=torch.cuda.get_device_name(), torch=torch.__version__, configs=CONFIGS, rows=rows, times=times, kernels=breakdown, compiled=info), indent=1))

    for shape in TARGETS:
        for name in [*CONFIGS, "portable"]:
            if time.time() - T0 > LIMIT_ALL:
                break
            key = f"{name} {shape}"
            if name != "portable" and ((shape[3] > 16 and (name not in LARGE_N or 3 not in right[name])) or not {0, 1} <= set(right[name])):
                continue
            try:
                t, dout, _ = tensors(shape, torch.bfloat16)
                every = triton_config.chunk_size(shape[3]) if name == "portable" else make(H, name).chunk
                inputs, kept = s6_prepared(t, every, True)
                config = None if name == "portable" else make(H, name)
                call = (lambda: triton_scan.scan_backward(inputs, kept, dout, None)) if config is None else (lambda: H.scan_backward(inputs.original, inputs.softplus, kept, dout, None, config=config))
                times[key] = timed(call)
                if shape[2] <= 8192:
                    breakdown[key] = parts(call)
            except Exception as exc:
                times[key] = f"{type(exc).__name__}: {exc}"[:200]
            t = dout = inputs = kept = call = None
            torch.cuda.empty_cache()
        save()
    # segments of time, of the best configuration at B=1
    best = min((v, k.split(" ")[0]) for k, v in times.items() if isinstance(v, float) and "(1, 2048, 2048, 16)" in k)[1]
    if best != "portable":
        for shape in [(1, 2048, 2048, 16), (1, 2048, 8192, 16), (8, 2048, 2048, 16)]:
            t, dout, _ = tensors(shape, torch.bfloat16)
            config = make(H, best)
            inputs, kept = s6_prepared(t, config.chunk, True)
            for segments in (1, 2, 4, 8, 11, 16, 32):
                if time.time() - T0 > LIMIT_ALL:
                    break
                times[f"{best}/{segments} segments {shape}"] = timed(lambda: H.scan_backward(inputs.original, inputs.softplus, kept, dout, None, config=config, segments=segments), 10)
    # forward with other distances of kept states, and a training step as users run it
    from mambench.kernels.s6 import hopper_scan
    for shape in [(1, 2048, 2048, 16), (1, 2048, 8192, 16), (8, 2048, 2048, 16), (1, 2048, 8192, 128)]:
        t, _, _ = tensors(shape, torch.bfloat16)
        for every in (None, 32, 64, 128):
            if time.time() - T0 < LIMIT_ALL:
                try:
                    times[f"forward/{every} {shape}"] = timed(lambda: hopper_scan.scan_forward(**t, delta_softplus=True, checkpoint_every=every), 10)
                except Exception as exc:
                    times[f"forward/{every} {shape}"] = f"{type(exc).__name__}: {exc}"[:200]
    try:
        for device in H.scan_backward_kernel.device_caches.values():
            for key, kernel in device[0].items():
                if hasattr(kernel, "n_regs"):
                    info[str(key)[-160:]] = [kernel.n_regs, kernel.n_spills, kernel.metadata.shared]
    except Exception as exc:
        info["error"] = str(exc)
    save()
    names = sorted({k.split(" (")[0] for k in times})
    print("| configuration | " + " | ".join(str(s)[1:-1] for s in TARGETS) + " |")
    for name in names:
        cells = [times.get(f"{name} {s}") for s in TARGETS]
        print(f"| {name} | " + " | ".join("" if v is None else f"{v:.4f}" if isinstance(v, float) else v[:24] for v in cells) + " |")
    print("| must, aim | " + " | ".join(f"{m} {a}" for m, a in TARGETS.values()) + " |")
    for key, kernels in breakdown.items():
        if key.startswith((best, "portable")):
            print(key, kernels)
    print(f"took {time.time() - T0:.0f} s")


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1:2] == ["check"] else main()
