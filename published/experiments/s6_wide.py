"""Selective scan backward of more than 16 states on Hopper: gradients, time, memory. From the repository root, one H100, 60 to 90 s:

    python3 published/experiments/s6_wide.py

Compiles and checks beside each other, then times. Writes $OUT/s6_mem_<part>.json, the table comes last.
"""
import json, os, sys, time
from pathlib import Path

from parts import S6_NAMES as NAMES, Found, finish, graph_ms, kernels, load_package, relative, s6_prepared as prepared, s6_reference as reference, s6_tensors as tensors, start

T0 = time.time()
OUT = Path(os.environ.get("OUT", "out")); OUT.mkdir(parents=True, exist_ok=True)
LIMIT = float(os.environ.get("LIMIT", 88))
CONFIGS = {'n128': ('wide', {'warps_n': 8, 'warps_d': 1, 'chunk': 256, 'note': 16}), 'n64': ('wide', {'warps_n': 4, 'warps_d': 2, 'chunk': 128, 'note': 8}), 'n32': ('wide', {'warps_n': 2, 'warps_d': 4, 'chunk': 64, 'note': 8}), 'n256': ('wide', {'lanes_n': 8, 'warps_n': 8, 'warps_d': 1, 'chunk': 512, 'mid': 64, 'note': 8, 'exchange': 8})}


def load():
    load_package()
    from mambench.kernels.s6 import hopper_backward
    return hopper_backward


def make(H, name):
    from mambench.kernels.s6.hopper_wide_memory import WideConfig
    kind, fields = CONFIGS[name]
    return (WideConfig if kind == "wide" else H.BackwardConfig)(**fields)


# batch, d_inner, seqlen, ngroups, d_state, dtype, z, D, bias, softplus, last-state gradient, segments, configuration
CHECKS = [(1, 2048, 520, 1, 128, 'bfloat16', 0, 1, 1, 1, 0, None, 'n128'), (2, 72, 515, 2, 100, 'float32', 0, 1, 1, 1, 1, 2, 'n128'), (1, 2304, 300, 1, 128, 'bfloat16', 1, 1, 1, 1, 1, None, 'n128'), (1, 2048, 512, 1, 64, 'bfloat16', 0, 1, 1, 1, 1, None, 'n64'), (2, 100, 333, 1, 50, 'float16', 0, 1, 1, 1, 1, 2, 'n64'), (1, 2048, 512, 1, 32, 'bfloat16', 0, 1, 1, 1, 0, None, 'n32'), (2, 200, 301, 2, 20, 'bfloat16', 1, 1, 1, 1, 1, 3, 'n32'), (1, 2048, 600, 1, 256, 'bfloat16', 0, 1, 1, 1, 1, None, 'n256'), (2, 40, 333, 1, 200, 'float32', 1, 1, 1, 1, 1, None, 'n256')]


def part_check(found, wanted):
    import torch
    H = load()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    for number in wanted:
        B, D, L, G, N, dtype, z, skip, bias, softplus, last, segments, name = case = CHECKS[number]

        def one():
            t, dout, dlast = tensors(B, L, N, D, getattr(torch, dtype), G, z, skip, bias, softplus, seed=number)
            dl = dlast if last else None
            config = make(H, name)
            inputs, kept = prepared(t, config.chunk, bool(softplus))
            run = lambda k: H.scan_backward(inputs.original, inputs.softplus, k, dout, dl, config=config, segments=segments)
            got, again = run([kept.clone()]), run([kept.clone()])
            more = [run([kept.clone()]) for _ in range(3)]
            torch.cuda.synchronize()
            want = reference(t, dout, dl, bool(softplus))
            errors = {k: relative(g, want[k]) for k, g in zip(NAMES, got) if g is not None}
            limit = dict(bfloat16=3e-3, float16=5e-4, float32=1e-5)[dtype]
            same = all(a is None or (torch.equal(a, b) and all(torch.equal(a, m[i]) for m in more)) for i, (a, b) in enumerate(zip(got, again)))
            ok = same and all(e < (limit if k not in ("A", "D", "delta_bias") else 2e-5) for k, e in errors.items())
            found.add(case=number, what=case, ok=ok, same=same, errors=errors)

        found.guarded(f"check {number} {case}", one)


TIMES = [(1, 8192, 128, 'n128', 1), (1, 2048, 128, 'n128', 1), (1, 8192, 64, 'n64', 1), (1, 8192, 32, 'n32', 1), (1, 8192, 256, 'n256', 1), (1, 2048, 64, 'n64', 0), (1, 2048, 32, 'n32', 0), (1, 2048, 256, 'n256', 0), (8, 2048, 128, 'n128', 0)]  # B, L, N, configuration, profile
PEAKS = [(1, 8192, 128, 'n128'), (1, 2048, 128, 'n128'), (8, 2048, 128, 'n128'), (1, 8192, 64, 'n64'), (1, 2048, 64, 'n64'), (1, 8192, 32, 'n32'), (1, 2048, 32, 'n32'), (1, 2048, 256, 'n256'), (1, 8192, 256, 'n256')]  # B, L, N, configuration


def part_times(found):
    """Everything timed, the most wanted first; begins when the file `go` is there."""
    import torch
    H = load()
    from mambench.kernels.s6 import hopper_scan
    torch.zeros(1, device="cuda")
    while not (OUT / "go").exists():
        time.sleep(0.05)
    results = {}

    def ours(B, L, N, name, deep):
        t, dout, _ = tensors(B, L, N)
        config = make(H, name)
        inputs, kept = prepared(t, config.chunk)
        call = lambda: H.scan_backward(inputs.original, inputs.softplus, [kept], dout, None, config=config)
        row = dict(shape=[B, L, N], who=name, ms=graph_ms(call, 6, 2))
        row["forward"] = graph_ms(lambda: hopper_scan.scan_forward(**t, delta_softplus=True, checkpoint_every=config.chunk), 6, 2)
        if deep:
            row["kernels"] = kernels(call)
        got = call()
        again = call()
        row["same"] = all(a is None or torch.equal(a, b) for a, b in zip(got, again))
        before = results.setdefault((B, L, N), (name, got))
        row["against"] = [before[0], max(relative(a, b) for a, b in zip(got, before[1]) if a is not None)]
        found.add(**row)

    for B, L, N, name, deep in TIMES:
        for key in [k for k in results if k != (B, L, N)]:
            del results[key]
        found.guarded(f"{B} {L} {N} {name}", ours, B, L, N, name, deep)
    results.clear()
    part_peaks(Found(OUT / "s6_mem_peaks.json"))


def peer(batch, seqlen, d_state, d_inner=2048):
    rows, shared = 2 * batch * seqlen * d_inner, 2 * batch * d_state * seqlen
    return 3 * rows + 8 * batch * d_inner * -(-seqlen // 2048) * d_state + 6 * shared + 4 * d_inner * (d_state + 2)


def part_peaks(found):
    import torch
    H = load()
    from mambench.kernels.s6.hopper_op import selective_scan
    torch.zeros(1, device="cuda")
    while not (OUT / "go").exists():
        time.sleep(0.05)

    def one(B, L, N, name):
        H.CHOSEN = {max(16, 1 << (N - 1).bit_length()): make(H, name)}
        t, dout, _ = tensors(B, L, N)
        given = [None if v is None else v.requires_grad_() for v in t.values()]
        for _ in range(2):
            torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = selective_scan(*given, delta_softplus=True)
            gradients = torch.autograd.grad(out, [g for g in given if g is not None], dout)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            del out, gradients
        found.add(shape=[B, L, N], who=name, peak=peak, peer=peer(B, L, N), launches=sum(n for _, n in kernels(lambda: torch.autograd.grad(selective_scan(*given, delta_softplus=True), [g for g in given if g is not None], dout)).values()))

    for case in PEAKS:
        found.guarded(str(case), one, *case)


def warm(name, N, B, L):
    """Compile what is timed, at small sizes."""
    import torch
    H = load()
    config = make(H, name)
    t, dout, _ = tensors(B, L, N)
    inputs, kept = prepared(t, config.chunk)
    H.scan_backward(inputs.original, inputs.softplus, [kept], dout, None, config=config)
    torch.cuda.synchronize()


def left():
    return LIMIT - (time.time() - T0)


def table(parts):
    rows = {p: json.loads(f.read_text()) for p in parts if (f := OUT / f"s6_mem_{p}.json").exists()}
    for p, found in rows.items():
        for r in found:
            if "failed" in r:
                print(f"FAILED {p} {r['label']}: {r['failed'][-400:]}")
    checks = [r for p, found in rows.items() for r in found if "ok" in r]
    print(f"gradients: {sum(r['ok'] for r in checks)} of {len(checks)} right (of {len(CHECKS)}), the same bits in {sum(r['same'] for r in checks)}")
    for r in checks:
        if not r["ok"]:
            print("  WRONG", r["case"], r["what"], "same bits", r["same"], r["errors"])
    print("B, L, N | who: backward ms, forward with states kept ms, same bits, against")
    for r in rows.get("times", []):
        if "ms" in r:
            print("  ", r["shape"], r["who"], r["ms"], r["forward"], r["same"], r["against"], {k: v for k, v in r.get("kernels", {}).items()} or "")
    print("B, L, N | who: peak MiB, the peer's formula, ratio, launches")
    for r in rows.get("peaks", []):
        if "peak" in r:
            print("  ", r["shape"], r["who"], round(r["peak"] / 2**20, 2), round(r["peer"] / 2**20, 2), round(r["peak"] / r["peer"], 3), r["launches"])


def main():
    if len(sys.argv) > 1:
        part, *rest = sys.argv[1:]
        if part == "warm":
            warm(rest[0], *map(int, rest[1:]))
        elif part == "check":
            part_check(Found(OUT / f"s6_mem_check{rest[0].split(',')[0]}.json"), list(map(int, rest[0].split(","))))
        else:
            globals()["part_" + part](Found(OUT / f"s6_mem_{part}.json"))
        return
    (OUT / "go").unlink(missing_ok=True)
    for old in OUT.glob("s6_mem_*.json"):
        old.unlink()
    running = [("times", start(__file__, OUT, "s6_mem", "times"))]
    warming = [(f"warm {c}", start(__file__, OUT, "s6_mem", "warm", c[3], str(c[2]), str(c[0]), str(c[1]))) for c in TIMES]
    checking = [(f"check {i}", start(__file__, OUT, "s6_mem", "check", str(i))) for i in range(len(CHECKS))]
    for label, process in warming + checking:
        finish(process, min(left() - 25, 62 - (time.time() - T0)), label)
    (OUT / "go").touch()
    print("prepared after", round(time.time() - T0, 1), flush=True)
    finish(running[0][1], left() - 1, "times")
    table(["times", "peaks", *(f"check{i}" for i in range(len(CHECKS)))])
    print("seconds", round(time.time() - T0, 1))


if __name__ == "__main__":
    main()
