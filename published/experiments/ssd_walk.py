"""SSD forward on Hopper: the walk that looks back as it is in the checkout, and variants, against four launches and one.

python3 ssd_walk.py, from the repository's root; about 25 s on 12 cores. Rows as they are made; $OUT/ssd_walk.json.
"""
import json, math, os, subprocess, sys, time, traceback, importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parts import load_package, replay_us, ssd_inputs as inputs

ROOT = Path.cwd()
OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
INF = math.inf


def setup():
    global torch, S, prepared, cases, flags, W, WK
    import torch
    sys.path.insert(0, str(ROOT / "tests/kernels/ssd"))
    load_package()
    from mambench.kernels import flags, prepared
    from mambench.kernels.ssd import hopper_ssd as S, hopper_walk as W, hopper_walk_kernel as WK
    import ssd_cases as cases
    torch.set_grad_enabled(False)


MADE = {}


def use(name):
    """Have the walk be a variant: "" is as it is."""
    if not name: W.walk_kernel = WK.walk_kernel; return
    if name not in MADE:
        source = Path(WK.__file__).read_text()
        for old, new in EDITS[name]:
            if old not in source: raise ValueError(f"{name}: not in the source: {old}")
            source = source.replace(old, new)
        stem = f"v_walk_{list(EDITS).index(name)}"; path = OUT / f"{stem}.py"
        if not path.exists() or path.read_text() != source: path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"mambench.kernels.ssd.{stem}", path)
        made = importlib.util.module_from_spec(spec); sys.modules[spec.name] = made; spec.loader.exec_module(made)
        MADE[name] = made.walk_kernel
    W.walk_kernel = MADE[name]


def planned(case, config):
    plan = S.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, INF), config=config, keep=False)
    ops = S.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
    return plan, ops


def forward(case, config, final=False, recording=None):
    plan, ops = planned(case, config)
    return lambda: S.run_forward(recording or prepared.Recording(None), plan, ops, return_final_states=final, keep=False, config=config)



DEEP = """@gluon.jit
def _added(state, own, log_decay, BLOCK_N: gl.constexpr, STATE: gl.constexpr):
    own = state_from_flat(own, BLOCK_N, STATE)
    return state * gl.exp2(log_decay) + own.to(gl.float32)


@gluon.jit
def look_back(state, slots, decays, flags, segment, BLOCK_N: gl.constexpr, STATE: gl.constexpr):
    FLAT: gl.constexpr = flat_layout(BLOCK_N)
    SIZE: gl.constexpr = _P * BLOCK_N
    await_published(flags, segment)
    count_readers(flags, segment)
    slots += gl.arange(0, SIZE, layout=FLAT)
    for k in range(0, segment, 4):
        own_0 = gl.load(slots + k * SIZE)
        decay_0 = gl.load(decays + k)
        own_1 = gl.load(slots + (k + 1) * SIZE, mask=k + 1 < segment)
        decay_1 = gl.load(decays + k + 1, mask=k + 1 < segment)
        own_2 = gl.load(slots + (k + 2) * SIZE, mask=k + 2 < segment)
        decay_2 = gl.load(decays + k + 2, mask=k + 2 < segment)
        own_3 = gl.load(slots + (k + 3) * SIZE, mask=k + 3 < segment)
        decay_3 = gl.load(decays + k + 3, mask=k + 3 < segment)
        state = _added(state, own_0, decay_0, BLOCK_N, STATE)
        if k + 1 < segment:
            state = _added(state, own_1, decay_1, BLOCK_N, STATE)
        if k + 2 < segment:
            state = _added(state, own_2, decay_2, BLOCK_N, STATE)
        if k + 3 < segment:
            state = _added(state, own_3, decay_3, BLOCK_N, STATE)
    return state


"""
EDITS = {"no mild chunks": [("_LEAST_MILD = gl.constexpr(-64.0)", '_LEAST_MILD = gl.constexpr(float("inf"))')]}
LOOKS = lambda **k: S.Config(look_back=True, **k)
LS = (8192, 2048, 16384, 32768, 4096)
PARTS = ("walk", "no mild chunks", "final", "gated", "four", "fused", "fused final")


def compile_part(name):
    case = inputs(1, 2048, 32); config = LOOKS(segments=8)
    if name in EDITS: use(name); forward(case, config)()
    elif name == "walk": forward(case, config)()
    elif name == "final": forward(inputs(1, 1200, 8, start=True), config, final=True)()
    elif name == "gated": forward(inputs(1, 1200, 8, start=True, z=True), config, final=True)(); forward(inputs(1, 1200, 8, z=True), config)()
    elif name == "four": forward(case, S.Config())(); forward(inputs(1, 16384, 128), S.Config())(); forward(inputs(8, 2048, 32), S.Config())()
    elif name == "fused": forward(case, S.Config(fused=True, segments=8))()
    elif name == "fused final": forward(inputs(1, 512, 32), S.Config(fused=True, segments=1))()
    elif name == "short": forward(inputs(1, 512, 32), S.Config(pdl=False))()
    torch.cuda.synchronize()


def main_timing():
    found = {}
    def note(label, value):
        found[label] = value; print(f"{label:24}", json.dumps(value) if not isinstance(value, str) else value, flush=True)
        (OUT / "ssd_walk.json").write_text(json.dumps(found, indent=1))
    def tried(label, make):
        try: note(label, make())
        except Exception as e: note(label, "FAILED " + repr(e)[:300]); traceback.print_exc()
    def over(config, lengths=LS, heads=32, batch=1, **extra): return {L: round(replay_us(forward(inputs(batch, L, heads, **extra), config), 0.02), 2) for L in lengths}
    def right():
        got = {}
        for label, case, segments in (("start", inputs(1, 1200, 8, start=True), 8), ("gated, ragged", inputs(1, 1111, 8, start=True, z=True), 5)):
            want = cases.loop(**{k: v.double().cpu() for k, v in case.items() if torch.is_tensor(v)}, dt_softplus=True)
            call = forward(case, LOOKS(segments=segments), final=True); o, e, _ = call(); torch.cuda.synchronize()
            got[label] = [float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip((o, e), want)]
            again = [call() for _ in range(20)]; torch.cuda.synchronize(); got[label].append(all(torch.equal(a[0], o) and torch.equal(a[1], e) for a in again))
        got["flags left"] = sum(int(t.abs().sum()) for t in flags._streams.values()) + sum(int(k.zeros.abs().sum()) for k in flags._graphs.values())
        case = inputs(1, 8192, 32); a, b = forward(case, LOOKS())()[0], forward(case, S.Config())()[0]
        got["8192 from four launches"] = float((a.float() - b.float()).norm() / b.float().norm())
        return got
    tried("right", right)
    tried("walk", lambda: over(LOOKS(), (*LS, 131072)))
    for name in EDITS: use(name); tried(name, lambda: over(LOOKS()))
    use("")
    tried("four", lambda: over(S.Config(), (*LS, 131072)))
    tried("chosen", lambda: over(None, (8192, 16384, 4096, 2048, 1024)))
    for B, L, H in ((1, 16384, 128), (1, 2048, 80), (2, 4096, 32)): tried(str((B, L, H)), lambda: {"four": over(S.Config(), (L,), H, B)[L], "walk": over(LOOKS(), (L,), H, B)[L]})
    tried("gated", lambda: {"four": over(S.Config(), (8192,), z=True), "walk": over(LOOKS(), (8192,), z=True)})


def main():
    begin = time.time()
    def part(name):
        t = time.time()
        try: done = subprocess.run([sys.executable, __file__, "compile", name], timeout=35, capture_output=True, text=True); code = done.returncode; said = done.stderr[-500:] if code else ""
        except subprocess.TimeoutExpired: code, said = "timeout", ""
        if code: print(f"compiled {name}: {code} {time.time() - t:.0f} s {said}", flush=True)
    with ThreadPoolExecutor(12) as pool: list(pool.map(part, PARTS))
    print("compiled in", round(time.time() - begin), "s", flush=True)
    try: subprocess.run([sys.executable, __file__, "time"], timeout=45)
    except subprocess.TimeoutExpired: print("the timing ran past its limit", flush=True)
    print("seconds", round(time.time() - begin), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        setup()
        if sys.argv[1] == "compile": compile_part(sys.argv[2])
        else: main_timing()
    else: main()
