"""Host time of eager calls, and what the Hopper SSD's division of time costs: python3 host.py, from the repository's root.

Repeated calls must give the bits of first ones. Results: $OUT/host.json and tables; about 75 s on an H100.
`host.py warm PART` compiles what a part needs; the parts are warmed side by side first.
"""
import json, math, os, statistics, subprocess, sys, time, traceback
from pathlib import Path

from parts import load_package, replay_us

ROOT = Path.cwd()
OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
START = time.time()
LIMIT = float(os.environ.get("LIMIT", "140"))
import torch

load_package()
from mambench.kernels import prepared, repeated
from mambench.kernels.s6 import hopper_op as s6_hopper, hopper_scan, triton_scan
from mambench.kernels.ssd import hopper_op, hopper_ssd, triton_ssd
from mambench.kernels.state_update import triton_update

WARM = len(sys.argv) > 2 and sys.argv[1] == "warm"
FOUND = {}
BF = torch.bfloat16
CALLS = {"ssd hopper": hopper_op._calls, "ssd triton": triton_ssd._calls, "s6 hopper": hopper_scan._calls,
         "s6 triton": triton_scan._calls, "update ssd": triton_update._calls, "update s6": triton_update._calls}


def randn(*shape, dtype=BF):
    return torch.randn(shape, device="cuda", dtype=dtype)


def ssd_inputs(L, B=1, H=32, P=64, N=128, G=1, dtype=BF, z=False):
    torch.manual_seed(0)
    return dict(x=randn(B, L, H, P, dtype=dtype), dt=randn(B, L, H, dtype=dtype), A=-torch.rand(H, device="cuda") * 4 - 0.1,
                B=randn(B, L, G, N, dtype=dtype), C=randn(B, L, G, N, dtype=dtype), D=torch.rand(H, device="cuda"),
                z=randn(B, L, H, P, dtype=dtype) if z else None, dt_bias=torch.rand(H, device="cuda") - 4, dt_softplus=True)


def s6_inputs(L, B=1, D=2048, N=16, dtype=BF):
    torch.manual_seed(0)
    return dict(u=randn(B, D, L, dtype=dtype), delta=randn(B, D, L, dtype=dtype), A=-torch.rand(D, N, device="cuda") - 0.1,
                B=randn(B, 1, N, L, dtype=dtype), C=randn(B, 1, N, L, dtype=dtype), D=torch.rand(D, device="cuda"),
                delta_bias=torch.rand(D, device="cuda") - 4, delta_softplus=True)


def update_inputs(ssd, B=1):
    torch.manual_seed(0)
    if ssd:
        return (randn(B, 80, 64, 128), randn(B, 80, 64), randn(B, 80), -torch.rand(80, device="cuda"), randn(B, 1, 128), randn(B, 1, 128),
                torch.rand(80, device="cuda"), None, torch.rand(80, device="cuda"), True)
    return (randn(B, 5120, 16), randn(B, 5120), randn(B, 5120), -torch.rand(5120, 16, device="cuda"), randn(B, 1, 16), randn(B, 1, 16),
            torch.rand(5120, device="cuda"), None, torch.rand(5120, device="cuda"), True)


def operations(L=512):
    ssd, s6 = ssd_inputs(L), s6_inputs(L)
    up, up6 = update_inputs(True), update_inputs(False)
    return {
        "ssd hopper": (lambda **k: hopper_op.ssd(**{**ssd, **k}, chunk_size=256), ssd),
        "ssd triton": (lambda **k: triton_ssd.ssd(**{**ssd, **k}, chunk_size=256), ssd),
        "s6 hopper": (lambda **k: s6_hopper.selective_scan(**{**s6, **k}), s6),
        "s6 triton": (lambda **k: triton_scan.selective_scan(**{**s6, **k}), s6),
        "update ssd": (lambda: triton_update.selective_state_update(*up), None),
        "update s6": (lambda: triton_update.selective_state_update(*up6), None),
    }


def idle(call, n=300):
    """Median and 5th percentile of a call's host time on an idle queue, us."""
    for _ in range(20): call()
    times = []
    for _ in range(n):
        torch.cuda.synchronize(); t = time.perf_counter(); call(); times.append(time.perf_counter() - t)
    times.sort()
    return times[n // 2] * 1e6, times[n // 20] * 1e6


def sustained(call, n=100, repeats=9):
    """Host time a call over n calls without waiting, us."""
    best = []
    for _ in range(repeats):
        torch.cuda.synchronize(); t = time.perf_counter()
        for _ in range(n): call()
        best.append((time.perf_counter() - t) / n * 1e6)
    torch.cuda.synchronize()
    return statistics.median(best)


def host():
    if WARM:
        for call, _ in operations().values():
            with torch.no_grad(): call()
        return
    print(f"{'host time, L=512':14} {'idle p50':>9} {'idle p5':>9} {'sustained':>9} {'first':>9} {'graph node':>10}   us; 'first' = not repeated")
    for name, (call, inputs) in operations().items():
        try:
            with torch.no_grad():
                p50, p5 = idle(call); sus = sustained(call)
                known = len(CALLS[name]._known)
                def first():
                    CALLS[name].clear(); call()
                unrepeated, _ = idle(first, 60)
            graph = None
            if inputs is not None:
                leaf = {k: v.detach().clone().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
                graph, _ = idle(lambda: call(**leaf), 100)
            print(f"{name:14} {p50:9.1f} {p5:9.1f} {sus:9.1f} {unrepeated:9.1f} {graph or float('nan'):10.1f}   known {known}", flush=True)
            FOUND[f"host {name}"] = [p50, p5, sus, unrepeated, graph, known]
        except Exception as e:
            print(name, "FAILED", repr(e)[:300]); traceback.print_exc()
    m = lambda f, n=3000: (f(), min((lambda t: ([f() for _ in range(n)], time.perf_counter() - t)[1])(time.perf_counter()) for _ in range(3)) / n * 1e6)[1]
    x = torch.zeros(1, 512, 32, 64, dtype=BF, device="cuda")
    e = repeated._template(x.shape, BF, x.device)
    known = next(iter(hopper_op._calls._known.items()), None)
    parts = {"empty_like": m(lambda: torch.empty_like(e, memory_format=torch.contiguous_format)),
             "empty": m(lambda: torch.empty(x.shape, dtype=BF, device=x.device)),
             "stream": m(lambda: repeated.driver.active.get_current_stream(0)), "current_device": m(torch.cuda.current_device)}
    if known:
        s = ssd_inputs(512); t = tuple(s.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"))
        parts["kind"] = m(lambda: prepared._kind(t, (True, 0.0, math.inf, None, False, False)))
    print("parts, us:", {k: round(v, 2) for k, v in parts.items()}, flush=True)
    FOUND["parts"] = parts


def same():
    """Repeated calls give the bits of first ones, on moved memory; new ways of entering states against float64."""
    from mambench.kernels.ssd.torch_ssd import ssd as torch_ssd
    bad = 0
    def check(what, ok):
        nonlocal bad
        bad += not ok
        if not ok: print("WRONG", what)
    clone = lambda d: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in d.items()}
    rows = [("ssd hopper", hopper_op.ssd, hopper_op._calls, [ssd_inputs(512), ssd_inputs(777, B=2, z=True), ssd_inputs(4096), ssd_inputs(1000, H=8, P=128, N=64, G=2, dtype=torch.float16)]),
            ("ssd triton", triton_ssd.ssd, triton_ssd._calls, [ssd_inputs(512), ssd_inputs(4096, z=True), ssd_inputs(333, H=4, P=40, N=24, dtype=torch.float32)]),
            ("s6 hopper", s6_hopper.selective_scan, hopper_scan._calls, [s6_inputs(512), s6_inputs(1001, D=40), s6_inputs(512, N=128, dtype=torch.float32)]),
            ("s6 triton", triton_scan.selective_scan, triton_scan._calls, [s6_inputs(512), s6_inputs(1001, D=40), s6_inputs(4096)])]
    for name, op, calls, cases in rows[: 4 if not WARM else 4]:
        extra = {"chunk_size": 64, "return_final_states": True} if name.startswith("ssd") else {"return_last_state": True}
        for i, case in enumerate(cases):
            try:
                with torch.no_grad():
                    calls.clear(); want = op(**case, **extra)
                    if WARM: continue
                    held = []
                    for _ in range(4):
                        moved = clone(case); got = op(**moved, **extra); held.append((moved, got))
                        check((name, i), all(torch.equal(a, b) for a, b in zip(want, got)))
                    junk = [torch.full_like(g, float("nan")) for g in want]; del junk
                    got = op(**clone(case), **extra); check((name, i, "reused memory"), all(torch.equal(a, b) for a, b in zip(want, got)))
                    if name == "ssd hopper" and i == 0:  # B and C of other addresses' alignment; one tensor for two arguments
                        base = torch.empty(case["x"].numel() + 8, dtype=BF, device="cuda")
                        x = base[1:-7].view(case["x"].shape).copy_(case["x"])
                        check("unaligned x", torch.equal(op(**{**case, "x": x}, **extra)[0], want[0]))
                        calls.clear(); op(**{**case, "C": case["B"]}, **extra)
                        check("alias", torch.equal(op(**case, **extra)[0], want[0]))
            except Exception as e:
                bad += 1; print("FAILED", name, i, repr(e)[:300]); traceback.print_exc()
    for B in (1, 64):
        for ssd in (True, False):
            args = update_inputs(ssd, B); first = args[0].clone(); triton_update._calls.clear()
            a, b = first.clone(), first.clone()
            with torch.no_grad():
                w = triton_update.selective_state_update(a, *args[1:]); 
                for _ in range(2):
                    b.copy_(first); g = triton_update.selective_state_update(b, *args[1:])
            check(("update", ssd, B), torch.equal(w, g) and torch.equal(a, b))
    if not WARM:
        print(f"repeated calls: {bad} wrong")
    FOUND["wrong"] = bad
    case = ssd_inputs(2048)
    ways = {"prefix fp32": (0, False), "prefix bf16": (0, True), "combined fp32": (16, False)}
    with torch.no_grad():
        if not WARM:
            wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
            out, final = torch_ssd(**wide, chunk_size=64, return_final_states=True)
        for way, (combined, narrow) in ways.items():
            for pdl in (False, True):
                config = hopper_ssd.Config(combined=combined, narrow=narrow, pdl=pdl)
                got = hopper_ssd.ssd_forward(**case, return_final_states=True, keep=False, config=config)
                if WARM: continue
                err = lambda a, b: ((a.double() - b).norm() / b.norm()).item()
                worst = lambda a, b: ((a.double() - b).flatten(0, 1).norm(dim=(1, 2)) / b.flatten(0, 1).norm(dim=(1, 2)).clamp_min(1e-9)).max().item()
                e = (err(got[0], out), err(got[1], final), worst(got[1], final))
                if not pdl: print(f"{way:14} relative error out {e[0]:.3e}, final states {e[1]:.3e}, of the worst head {e[2]:.3e}")
                FOUND[f"error {way} {pdl}"] = e


def memory():
    if WARM: return
    print(f"{'extra memory, MiB':24} {'ours':>9} {'mamba_ssm':>9}   (theirs by arithmetic; published: 4.625 at L=512, 15.5 at 2048, 59.0 at 8192)")
    for B, L, H in ((1, 512, 32), (1, 576, 32), (1, 768, 32), (1, 1024, 32), (1, 1536, 32), (1, 2048, 32), (1, 4096, 32), (1, 8192, 32), (1, 32768, 32), (8, 2048, 32),
                    (1, 16384, 128), (1, 1024, 16), (1, 2048, 16), (1, 1024, 8), (1, 2048, 8), (1, 4096, 8), (1, 2048, 4)):
        case = ssd_inputs(L, B=B, H=H)
        with torch.no_grad():
            call = lambda: hopper_op.ssd(**case, chunk_size=256)
            call(); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
            call(); ours = torch.cuda.max_memory_allocated() - before
        P, N, G, c = 64, 128, 1, -(-L // 256)
        base, states = 8 * B * L * H, B * H * P * N * c
        theirs = max(base + 4 * states + 2 * states + 4 * B * H * P * N,
                     base + 2 * states + 4 * B * H * P * N + 4 * B * c * G * 256 * 256 + 2 * B * L * H * P)
        flag = "" if ours <= theirs else "  ABOVE"
        print(f"B={B} L={L:6} H={H:4} {'':6} {ours / 2**20:9.3f} {theirs / 2**20:9.3f}{flag}")
        FOUND[f"memory {B} {L} {H}"] = (ours, theirs)


def kernels_of(call):
    """GPU time of each kernel of a call, us, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile
    call(); torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(10): call()
        torch.cuda.synchronize()
    total = {}
    for e in p.events():
        if "kernel" in e.name: total[e.name] = total.get(e.name, 0) + e.device_time_total / 10
    return {k: round(v, 1) for k, v in sorted(total.items())}


WAYS = {"pre32": dict(combined=0, narrow=False), "pre16": dict(combined=0, narrow=True), "com32": dict(combined=16, narrow=False)}


def ways():
    rows = [(1, 1024, 32), (1, 2048, 32), (1, 4096, 32), (1, 8192, 32), (1, 32768, 32), (8, 2048, 32), (1, 16384, 128), (1, 2048, 8)]
    if not WARM: print(f"{'GPU time, us':18}" + "".join(f"{w + ('+pdl' if p else ''):>11}" for w in WAYS for p in (False, True)) + f"{'chosen':>11}{'chosen':>11}")
    for B, L, H in rows if not WARM else [rows[0], rows[6]]:
        case, line = ssd_inputs(L, B=B, H=H), []
        configs = [(w, p, hopper_ssd.Config(**kw, pdl=p)) for w, kw in WAYS.items() for p in (False, True)] + [("chosen", 0, None), ("chosen", 1, None)]
        for way, pdl, config in configs:
            with torch.no_grad():
                plan = hopper_ssd.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, math.inf))
                ops = hopper_ssd.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
                call = lambda: hopper_ssd.run_forward(prepared.Recording(None), plan, ops, return_final_states=False, keep=False, config=config)
                if WARM: call(); continue
                try: us = replay_us(call, least=3)
                except Exception as e: us = float("nan"); print("FAILED", way, pdl, repr(e)[:200])
            line.append(us); FOUND[f"ways {B} {L} {H} {way} {pdl}"] = us
        if not WARM: print(f"B={B} L={L:6} H={H:4}" + "".join(f"{u:11.1f}" for u in line), flush=True)
    if WARM: return
    for L in (2048, 8192, 32768, 1 << 20):
        case = ssd_inputs(L)
        with torch.no_grad():
            try: print(f"kernels L={L}:", kernels_of(lambda: hopper_ssd.ssd_forward(**case, keep=False)), flush=True)
            except Exception as e: print("kernels", repr(e)[:200])


def scaling():
    """ns a token at batch 1, H=32: by the longest walk of a segment, in chunks; memory besides the output."""
    counts = ("op", None, 128, 256, 512)
    if not WARM: print(f"{'ns/token':12}" + "".join(f"{'unlimited' if s is None else s:>10}" for s in counts) + "   op, other order   MiB besides out")
    for L in (8192, 32768, 131072, 262144, 524288, 1 << 20) if not WARM else (8192, 16384):
        if time.time() - START > LIMIT: print("no time left"); return
        case, line = ssd_inputs(L), []
        op = lambda: hopper_op.ssd(**case, chunk_size=256)
        for walk in counts + ("op",):
            config = None if walk == "op" else hopper_ssd.Config(walk=walk)
            with torch.no_grad():
                call = op if walk == "op" else lambda: hopper_ssd.ssd_forward(**case, keep=False, config=config)
                if WARM: hopper_ssd.ssd_forward(**case, return_final_states=True, keep=False, config=hopper_ssd.Config(walk=4)); call(); continue
                try: us = replay_us(call, total_s=0.1, least=3, per=1 if L > 100000 else None)
                except Exception as e: us = float("nan"); print("FAILED", L, walk, repr(e)[:200])
            line.append(us * 1e3 / L); FOUND[f"scaling {L} {walk} {len(line)}"] = us
        if WARM: continue
        with torch.no_grad():
            op(); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
            out = op(); extra = torch.cuda.max_memory_allocated() - before - out.numel() * 2
        print(f"L={L:9} " + "".join(f"{v:10.2f}" for v in line) + f"{extra / 2**20:14.1f}", flush=True)
        del case, out; torch.cuda.empty_cache()
    if WARM: return
    bad = 0  # in parts: against one walk, first and repeated, with and without a state to start from
    for L, B, start, z in ((20000, 1, False, False), (8192 * 3 + 5, 2, True, True), (300000, 1, True, False)):
        case = ssd_inputs(L, B=B, H=8 if L < 100000 else 32, z=z)
        H = case["x"].shape[2]
        case["initial_states"] = torch.randn(B, H, 64, 128, device="cuda") if start else None
        with torch.no_grad():
            want = hopper_ssd.ssd_forward(**case, return_final_states=True, keep=False, config=hopper_ssd.Config(walk=None))
            got = hopper_ssd.ssd_forward(**case, return_final_states=True, keep=False, config=hopper_ssd.Config(walk=4 if L < 100000 else 256))
            err = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, want) if b is not None]
            print(f"parts L={L} B={B}: against one walk {err[0]:.2e} {err[1]:.2e}", flush=True)
            bad += not (err[0] < 4e-3 and err[1] < 4e-3)
            if L >= 100000:
                hopper_op._calls.clear()
                firsts = hopper_op.ssd(**case, chunk_size=64, return_final_states=True); bad += not all(map(torch.equal, firsts, got[:2]))
                for _ in range(3):
                    moved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
                    again = hopper_op.ssd(**moved, chunk_size=64, return_final_states=True); bad += not all(map(torch.equal, firsts, again))
                print("repeated known", len(hopper_op._calls._known))
        FOUND[f"parts {L}"] = err
    print(f"parts: {bad} wrong"); FOUND["parts wrong"] = bad


PARTS = {"host": host, "same": same, "memory": memory, "ways": ways, "scaling": scaling}
if WARM:
    PARTS[sys.argv[2]](); torch.cuda.synchronize(); sys.exit()
if len(sys.argv) > 2:
    PARTS[sys.argv[2]](); (OUT / f"host_{sys.argv[2]}.json").write_text(json.dumps(FOUND, indent=1, default=str)); sys.exit()
warming = [subprocess.Popen([sys.executable, __file__, "warm", part], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=open(OUT / f"warm_{part}.txt", "w")) for part in ("host", "same", "ways", "scaling")]
for w in warming:
    try: w.wait(timeout=max(1, 60 - (time.time() - START)))
    except subprocess.TimeoutExpired: w.kill(); print("warming was cut off")
print(f"warmed in {time.time() - START:.0f} s", flush=True)
for name, part in PARTS.items():
    t = time.time()
    try: part()
    except Exception as e: print(name, "FAILED", repr(e)[:300]); traceback.print_exc()
    (OUT / "host.json").write_text(json.dumps(FOUND, indent=1, default=str))
    print(f"-- {name}: {time.time() - t:.0f} s", flush=True)
print(f"all in {time.time() - START:.0f} s")
