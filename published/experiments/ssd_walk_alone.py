"""SSD forward on Hopper, the walk of the checkout: alone, alone without PDL, in two launches, and what the plan chooses.

python3 ssd_walk_alone.py [right | time], from the repository's root; two minutes for both. $OUT/alone.jsonl. right: errors against float64,
same bits, a graph, streams, and flags left zero.
"""
import json, math, os, subprocess, sys
from pathlib import Path
OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
def setup():
    global torch, S, prepared, cases, flags, replay_us, inputs
    sys.path.insert(0, "published/experiments"); sys.path.insert(0, "tests/kernels/ssd")
    from parts import load_package, replay_us, ssd_inputs as inputs
    load_package()
    import torch, ssd_cases as cases
    from mambench.kernels import prepared, flags
    from mambench.kernels.ssd import hopper_ssd as S
    torch.set_grad_enabled(False)
def forward(case, config, final=False, keep=False):
    plan = S.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, math.inf), config=config, keep=keep)
    ops = S.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
    return lambda: S.run_forward(prepared.Recording(None), plan, ops, return_final_states=final, keep=keep, config=config)
def steep(c, t):
    dt = torch.nn.functional.softplus(c["dt"].float() + c["dt_bias"]).mean((0, 1)); want = -t / 64 / 1.4427 / dt
    return {**c, "A": torch.where(torch.arange(len(dt), device="cuda") % 8 == 0, want, c["A"])}
L = lambda **k: S.Config(**{"look_back": True, "alone": True} | k)
mode = (sys.argv[1:] + ["all"])[0]
if mode == "right":
    setup(); bad = []
    many = [("start", inputs(1, 1200, 8, start=True), 4), ("gated ragged", inputs(1, 1111, 8, start=True, z=True), 2), ("groups", inputs(2, 700, 6, G=3, start=True), 3), ("P=128", steep(inputs(1, 1500, 4, P=128), 100), 2), ("N=64", steep(inputs(1, 2100, 4, N=64), 100), 4), ("odd heads", inputs(1, 900, 5), 4), ("one segment", inputs(3, 700, 4, start=True), 1), ("P=40 N=24 one", inputs(2, 200, 6, P=40, N=24, G=2), 1), ("fp16", inputs(1, 800, 4, dtype=torch.float16), 3)] + [(f"decay {t}", steep(inputs(1, 1500, 16), t), 3) for t in (60, 127, 129, 500)]
    for label, case, n in many:
        want = cases.loop(**{k: v.double().cpu() for k, v in case.items() if torch.is_tensor(v)}, dt_softplus=True)
        call = forward(case, L(segments=n), final=True); o, e, _ = call(); torch.cuda.synchronize()
        err = [float("%.2g" % ((a.double().cpu() - b).norm() / b.norm())) for a, b in zip((o, e), want)]
        ref = forward(case, L(segments=n, alone=False), final=True)()
        two = [float("%.2g" % ((a.double().cpu() - b).norm() / b.norm())) for a, b in zip(ref[:2], want)]
        same = all(torch.equal(a[0], o) and torch.equal(a[1], e) for a in [call() for _ in range(20)]); torch.cuda.synchronize()
        if not (max(err) < 6e-3 and same): bad.append(label)
        print(label, err, "in two launches", two, same, flush=True)
    case = inputs(1, 8192, 32); call = forward(case, L()); o = call()[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): held = [call()[0] for _ in range(4)]
    for _ in range(50): graph.replay()
    torch.cuda.synchronize(); same = all(torch.equal(h, o) for h in held)
    streams = [torch.cuda.Stream() for _ in range(3)]; got = []
    for i in range(60):
        with torch.cuda.stream(streams[i % 3]): got.append(call()[0])
    torch.cuda.synchronize(); streams_same = all(torch.equal(g, o) for g in got)
    left = sum(int(t.abs().sum()) for t in flags._streams.values()) + sum(int(k.zeros.abs().sum()) for k in flags._graphs.values())
    four = forward(case, S.Config())()[0]
    print("graph", same, "streams", streams_same, "flags left", left, "from four", float((o.float() - four.float()).norm() / four.float().norm()))
    print("RIGHT" if same and streams_same and not left and not bad else f"WRONG {bad}"); sys.exit()
if mode == "time":
    setup()
    t = lambda c, cfg: round(replay_us(forward(c, cfg), 0.02), 2)
    for r in range(2):
        for Ln, B, H in ((8192, 1, 32), (4096, 1, 32), (2048, 1, 32), (1024, 1, 32), (512, 1, 32), (16384, 1, 32), (4096, 2, 32), (2048, 1, 80)):
            case = inputs(B, Ln, H)
            row = {"alone": t(case, L()), "alone, no pdl": t(case, L(pdl=False)), "two": t(case, L(alone=False))}
            if B * Ln * H <= 2048 * 32: row["chosen"] = t(case, None)
            print(B, Ln, H, json.dumps(row), flush=True)
            with open(OUT / "alone.jsonl", "a") as f: f.write(json.dumps([B, Ln, H, row]) + "\n")
    for d in (50, 100, 200): print("8192, 1 of 8 by 2^-", d, t(steep(inputs(1, 8192, 32), d), L()), t(steep(inputs(1, 8192, 32), d), L(alone=False)), flush=True)
    c = inputs(1, 8192, 32, z=True); print("gated", t(c, L()), t(c, L(alone=False)))
    sys.exit()
for m, limit in (("right", 75), ("time", 60)):
    try: done = subprocess.run([sys.executable, __file__, m], timeout=limit, capture_output=True, text=True); print(done.stdout + done.stderr[-1500:], flush=True)
    except subprocess.TimeoutExpired as e: print(m, "timeout", (e.stdout or b"").decode()[-3000:], flush=True)
