"""Check and time the Hopper SSD forward: python3 ssd_forward.py, from the repository's root.

Every configuration is checked in processes of its own (a failure stops no other), which also fill
the compilation cache; then everything that was right is timed here, one at a time: graph replay,
median, warm L2. Results: $RESULTS/ssd_forward.json, and a table last.
"""
import importlib.util, json, math, os, runpy, subprocess, sys, time
from pathlib import Path

ROOT = Path.cwd()
T0 = time.time()

CONFIGS = {
    "base": dict(),
    "own": dict(scores=False),
    "no-pdl": dict(pdl=False),
    "own-no-pdl": dict(scores=False, pdl=False),
    "cb32": dict(scores_fp32=True),
    "2-stages": dict(stages=2, state_stages=3),
    "r216": dict(registers=216),
}
if os.environ.get("SSD_EXTRA"):  # JSON of further configurations
    CONFIGS.update(json.loads(os.environ["SSD_EXTRA"]))
# (batch, seqlen, nheads): must, aim in ms; headdim 64, d_state 128, one group
TARGETS = {
    (1, 512, 32): (None, None), (1, 2048, 32): (0.032, 0.022), (1, 8192, 32): (0.085, 0.056), (1, 32768, 32): (0.28, 0.19),
    (8, 2048, 32): (0.105, 0.075), (1, 16384, 128): (0.5, 0.34),
}
SWEEP = {(1, 2048, 32): (4, 8, 16), (1, 8192, 32): (4, 8, 16), (1, 32768, 32): (8, 16), (8, 2048, 32): (1, 2), (1, 16384, 128): (1, 2, 4)}
K = dict(headdim=64, d_state=128, nheads=4, dtype="bfloat16", gated=False, start=False)
# what every configuration must get right; `segments` None: as the device is filled
CHECKS = [
    dict(K, seqlen=1024, segments=4, final=False),          # as timed, several segments
    dict(K, seqlen=320, segments=1, final=False),           # as timed, one segment
    dict(K, seqlen=333, batch=2, segments=3, gated=True, start=True, nheads=6, ngroups=2, long_memory=True),
]
MORE = [
    dict(K, seqlen=1000, segments=None, start=True, long_memory=True, nheads=8),
    dict(K, seqlen=1),
    dict(K, seqlen=65, D=2, gated=True, nheads=3, ngroups=3, segments=2),
    dict(K, seqlen=200, headdim=128, D=2, segments=2, start=True, nheads=2),
    dict(K, seqlen=257, headdim=32, d_state=64, segments=2, nheads=5),
    dict(K, seqlen=130, headdim=40, d_state=24, D=0, bias=False, nheads=3, segments=2),
    dict(K, seqlen=500, d_state=16, segments=3, nheads=3),
    dict(K, seqlen=500, d_state=32, segments=3, gated=True),
    dict(K, seqlen=700, dtype="float16", segments=4, start=True, gated=True, nheads=16, ngroups=8),
    dict(K, seqlen=700, dtype="float16", d_state=64, segments=2, D=0),
    dict(K, seqlen=512, batch=3, segments=2, extreme=True, softplus=False, limit=[1e-3, 0.4]),
    dict(K, seqlen=512, segments=2, extreme=True),
    dict(K, seqlen=300, d_state=256, segments=2),           # refused today unless the limit is lifted
]
SLICES = 4  # processes for MORE


def load():
    runpy.run_path("mambench/_start.py")["load_package"](Path("mambench").resolve())
    import mambench
    if str(ROOT) not in mambench.__path__:
        mambench.__path__.append(str(ROOT))
    from mambench.kernels.ssd import hopper_ssd
    return hopper_ssd


def cases():
    spec = importlib.util.spec_from_file_location("ssd_cases", ROOT / "tests/kernels/ssd/ssd_cases.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ssd_cases"] = module
    spec.loader.exec_module(module)
    return module


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check(name, part):
    """Run the checks of one configuration (part -1) or a slice of the further ones; print JSON lines."""
    import torch
    H, S = load(), cases()
    H.MAX_D_STATE = 256  # try what is not offered yet
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    wide = ("A", "D", "dt_bias", "initial_states")
    for number, case in enumerate(CHECKS if part < 0 else MORE[part::SLICES]):
        row = dict(config=name, case=case)
        try:
            case = dict(case)
            segments, softplus, final, limit = case.pop("segments", None), case.pop("softplus", True), case.pop("final", True), tuple(case.pop("limit", (0.0, math.inf)))
            extreme = case.pop("extreme", False)
            dtype = getattr(torch, case["dtype"])
            given = S.draw(**case, seed=number)
            if extreme:
                given["A"][0], given["A"][1] = -80.0, -1e-4
                given["dt"] = (given["dt"] * (3 if softplus else 0.2)).to(dtype).double()
            given = {k: v.cuda() for k, v in given.items()}
            with torch.device("cuda"):
                want, state = S.loop(**given, dt_softplus=softplus, dt_limit=limit)
            cast = {k: v.to(torch.float32 if k in wide else dtype) for k, v in given.items()}
            config = H.Config(**{**CONFIGS[name], "segments": segments})
            began = time.time()
            out, last, entries = H.ssd_forward(**cast, dt_softplus=softplus, dt_limit=limit, return_final_states=final, config=config)
            torch.cuda.synchronize()
            row["compile_s"] = round(time.time() - began, 1)
            row["out"] = error(out, want)
            row["max"] = ((out.double() - want).abs().max() / want.abs().max()).item()
            row["state"] = error(last, state) if final else 0.0
            per = -(-(-(-case["seqlen"] // 64)) // entries.shape[2]) * 64 if entries is not None and entries.dim() == 5 else 0
            if per and per < case["seqlen"]:  # what enters the second segment
                with torch.device("cuda"):
                    head = {k: (v[:, :per] if k in ("x", "dt", "B", "C", "z") else v) for k, v in given.items()}
                    row["entry"] = error(entries[:, :, 1], S.loop(**head, dt_softplus=softplus, dt_limit=limit)[1])
            bound = 2 * torch.finfo(dtype).eps  # 0.0156 bf16, 0.002 fp16: rms is well below
            again = H.ssd_forward(**cast, dt_softplus=softplus, dt_limit=limit, return_final_states=final, config=config)  # launched directly
            row["same"] = bool(torch.equal(out, again[0]) and (not final or torch.equal(last, again[1])))
            row["ok"] = bool(row["same"] and row["out"] < 0.5 * bound and row["state"] < 0.5 * bound and row.get("entry", 0.0) < 0.5 * bound)
        except Exception as exc:
            row.update(ok=False, error=f"{type(exc).__name__}: {exc}"[:1500])
            if "CUDA error" in str(exc) or "illegal" in str(exc):
                print("ROW " + json.dumps(row), flush=True)
                return
        print("ROW " + json.dumps(row), flush=True)


def inputs(shape, headdim=64, d_state=128, ngroups=1, dtype=None):
    import torch
    dtype = dtype or torch.bfloat16
    batch, seqlen, nheads = shape
    r = lambda *s: torch.randn(*s, device="cuda", dtype=dtype)
    return dict(x=r(batch, seqlen, nheads, headdim), dt=r(batch, seqlen, nheads) * 0.5 - 2, A=-torch.rand(nheads, device="cuda") * 4,
                B=r(batch, seqlen, ngroups, d_state), C=r(batch, seqlen, ngroups, d_state),
                D=torch.randn(nheads, device="cuda"), dt_bias=torch.randn(nheads, device="cuda") * 0.1)


def timed(function):
    from triton.testing import do_bench_cudagraph
    return do_bench_cudagraph(function, rep=30, return_mode="median")


def attempt(results, key, function):
    import torch
    try:
        results[key] = function()
    except Exception as exc:
        results[key] = f"{type(exc).__name__}: {exc}"[:300]
        if "CUDA error" in str(exc) or "illegal" in str(exc):
            raise SystemExit(f"the context is lost at {key}: {exc}"[:400])
    torch.cuda.empty_cache()


def spawn(args):
    log = open(f"/tmp/ssd_{'_'.join(args)}.log", "w+")
    return subprocess.Popen([sys.executable, __file__, *args], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT), log


def kernel_times(call, calls=20):
    """GPU time of each kernel of a call, us, by the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    call(), torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found = {}
    for event in prof.key_averages():
        spent = getattr(event, "self_device_time_total", 0) or getattr(event, "self_cuda_time_total", 0)
        if spent:
            found[event.key[:24]] = round(spent / calls, 2)
    return found


def host_us(call, repeats=200):
    import torch
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - began
    torch.cuda.synchronize()
    return spent / repeats * 1e6


def save(result):
    if os.environ.get("RESULTS"):
        Path(os.environ["RESULTS"], "ssd_forward.json").write_text(json.dumps(result, indent=1))


def main():
    import torch
    checkers = {(name, -1): spawn(["check", name, "-1"]) for name in CONFIGS}
    checkers |= {("base", k): spawn(["check", "base", str(k)]) for k in range(SLICES)}
    H = load()
    rows, right = [], []
    for (name, part), (process, log) in checkers.items():
        try:
            process.wait(timeout=max(3, 75 - (time.time() - T0)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.seek(0)
        text = log.read()
        mine = [json.loads(l[4:]) for l in text.splitlines() if l.startswith("ROW ")]
        rows += mine
        if part < 0 and len(mine) == len(CHECKS) and all(r["ok"] for r in mine):
            right.append(name)
        if process.returncode != 0 or not mine:
            rows.append(dict(config=f"{name}/{part}", ok=False, error="rc %s: %s" % (process.returncode, text[-1500:])))
    print(f"checked after {time.time() - T0:.0f} s; right: {right}", flush=True)
    result = dict(device=torch.cuda.get_device_name(), checks=rows)
    save(result)
    times, sweep, extras, parts, agree = {}, {}, {}, {}, {}
    result.update(times_ms=times, sweep_ms=sweep, extras=extras, kernels_us=parts, agreement=agree)

    try:
        from mambench.kernels.ssd.triton_ssd import ssd as portable
    except Exception as exc:
        portable, extras["portable"] = None, repr(exc)[:300]

    def bench(t, name="base", **kw):
        config = H.Config(**{**CONFIGS[name], **{k: kw.pop(k) for k in list(kw) if k == "segments"}})
        with torch.no_grad():
            return timed(lambda: H.ssd_forward(**t, dt_softplus=True, config=config, **kw))

    def compare(t):
        out = H.ssd_forward(**t, dt_softplus=True, config=H.Config(**CONFIGS[right[0]]))[0]
        return error(out, portable(**t, chunk_size=256, dt_softplus=True).double())

    big = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(big)
    result["bandwidth_gb_s"] = 2 * big.numel() * 4 / timed(lambda: target.copy_(big)) / 1e6
    del big, target
    for shape in TARGETS:
        with torch.no_grad():
            t = inputs(shape)
            for name in right:
                attempt(times, f"{name} {shape}", lambda: bench(t, name))
            if portable:
                attempt(times, f"portable {shape}", lambda: timed(lambda: portable(**t, chunk_size=256, dt_softplus=True)))
            if right:
                if portable:
                    attempt(agree, str(shape), lambda: compare(t))
                for n in SWEEP.get(shape, ()):
                    attempt(sweep, f"{shape} {n} segments", lambda: bench(t, right[0], segments=n))
                attempt(parts, str(shape), lambda: kernel_times(lambda: H.ssd_forward(**t, dt_softplus=True, config=H.Config(**CONFIGS[right[0]]))))
        save(result)
        if time.time() - T0 > 120:
            print("out of time after", shape)
            break
    if right:
        first = right[0]
        config = H.Config(**CONFIGS[first])
        call = lambda t, **kw: H.ssd_forward(**t, dt_softplus=True, config=kw.pop("config", config), **kw)
        base = (1, 8192, 32)
        t = inputs(base)
        attempt(extras, "final state", lambda: bench(t, first, return_final_states=True))
        attempt(extras, "z", lambda: bench({**t, "z": t["x"].clone()}, first))
        attempt(extras, "D (H, P)", lambda: bench({**t, "D": torch.randn(32, 64, device="cuda")}, first))
        attempt(extras, "no D, no bias", lambda: bench({**t, "D": None, "dt_bias": None}, first))
        attempt(extras, "L=8191", lambda: bench(inputs((1, 8191, 32)), first))
        for key, size in (("N=64", dict(d_state=64)), ("N=16", dict(d_state=16)), ("P=128 H=16", dict(headdim=128)), ("G=8", dict(ngroups=8)), ("fp16", dict(dtype=torch.float16))):
            u = inputs((1, 8192, 16 if "P=" in key else 32), **size)
            attempt(extras, key, lambda: bench(u, first))
            if portable and key != "G=8":
                attempt(extras, key + " portable", lambda: timed(lambda: portable(**u, chunk_size=256, dt_softplus=True)))
        H.MAX_D_STATE = 256
        u = inputs(base, d_state=256)
        attempt(extras, "N=256", lambda: bench(u, first))
        if portable:
            attempt(extras, "N=256 portable", lambda: timed(lambda: portable(**u, chunk_size=256, dt_softplus=True)))
        u = inputs((1, 512, 32))
        one = H.Config(**{**CONFIGS[first], "segments": 1})
        attempt(extras, "eager L=512, host us", lambda: host_us(lambda: call(u)))
        attempt(extras, "eager L=512, one segment, host us", lambda: host_us(lambda: call(u, config=one)))
        attempt(extras, "eager L=8192, host us", lambda: host_us(lambda: call(t)))
        if portable:
            attempt(extras, "eager portable L=512, host us", lambda: host_us(lambda: portable(**u, chunk_size=256, dt_softplus=True)))
        launch = H.plan_hopper(u["x"], u["B"], dt_softplus=True, dt_limit=(0.0, math.inf), config=config)
        attempt(extras, "plan, host us", lambda: host_us(lambda: H.plan_hopper(u["x"], u["B"], dt_softplus=True, dt_limit=(0.0, math.inf), config=config)))
        attempt(extras, "one descriptor, host us", lambda: host_us(lambda: H.tiles_of(u["x"], 64)))
        operands = H.Operands.laid_out(*(u.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
        ring = H.ring(128, torch.bfloat16, False, config)
        attempt(extras, "prepare launch, host us", lambda: host_us(lambda: H.run_prepare(launch, operands, ring, config)))
        save(result)
        if time.time() - T0 < 130:
            t = inputs((1, 1 << 20, 32))  # 2 ** 31 elements of x
            attempt(extras, "L=1M H=32", lambda: bench(t, first))

            def slices_agree():
                out = call(t, config=H.Config(**{**CONFIGS[first], "segments": 8}))[0]
                part = {k: v[:, :, -2:].contiguous() if k in ("x", "dt") else v[-2:] if k in ("A", "D", "dt_bias") else v for k, v in t.items()}
                want = call(part, config=H.Config(**{**CONFIGS[first], "segments": 8}))[0]
                return bool(torch.equal(out[:, :, -2:], want))

            attempt(extras, "L=1M: last heads agree", slices_agree)
    result["seconds"] = time.time() - T0
    save(result)
    for r in rows:
        if not r["ok"] or r["config"] == "base":
            print({k: (f"{v:.1e}" if isinstance(v, float) and k != "compile_s" else v) for k, v in r.items()})
    print(f"\n{result['device']}, copy {result['bandwidth_gb_s']:.0f} GB/s; ms, graph replay, warm L2")
    names = [*right, "portable"]
    print(f"{'shape':18s}" + "".join(f"{n:>12s}" for n in names) + f"{'must':>8s}{'aim':>8s}")
    for shape, (must, aim) in TARGETS.items():
        cells = [times.get(f"{n} {shape}") for n in names]
        print(f"{str(shape):18s}" + "".join(f"{c:12.4f}" if isinstance(c, float) else f"{'failed':>12s}" for c in cells) + f"{must or 0:8.3f}{aim or 0:8.3f}")
    for title, group in (("segments", sweep), ("difference from portable", agree), ("extras", extras)):
        print(title + ": " + "; ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in group.items()))
    for k, v in parts.items():
        print("kernels us", k, v)
    print("failures:", [f"{k}: {v}" for k, v in times.items() if isinstance(v, str)], f"total {time.time() - T0:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        check(sys.argv[2], int(sys.argv[3]))
    else:
        main()
