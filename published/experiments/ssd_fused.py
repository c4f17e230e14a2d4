"""SSD forward on Hopper, timings: one walk with a look back (fused), variants of it, against four launches.

python3 ssd_fused.py, from the repository's root; about 60 s. Compiles side by side first (a line each), then prints each
result as it is made, most important first: a run that is cut short has lost only the rest. $OUT/ssd_fused.json.
"""
import itertools, json, math, os, subprocess, sys, time, traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parts import load_package, replay_us, ssd_inputs as inputs

ROOT = Path.cwd()
OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
INF = math.inf


def setup():
    global torch, S, hopper_op, prepared, cases, fused, flags
    import torch
    sys.path.insert(0, str(ROOT / "tests/kernels/ssd"))
    load_package()
    from mambench.kernels import flags, prepared
    from mambench.kernels.ssd import hopper_op, hopper_ssd as S, hopper_fused as fused
    import ssd_cases as cases
    torch.set_grad_enabled(False)


def variant(name):
    """Use a variant of the fused kernel."""
    import importlib.util
    from mambench.kernels.ssd import hopper_fused_kernel as K
    if name in MADE: fused.fused_kernel = MADE[name]; return
    source = Path(K.__file__).read_text()
    for old, new in ALL[name]:
        assert old in source, old
        source = source.replace(old, new)
    path = OUT / f"variant_{list(ALL).index(name)}.py"
    if not path.exists() or path.read_text() != source: path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"mambench.kernels.ssd.variant_{list(ALL).index(name)}", path)
    module = importlib.util.module_from_spec(spec); sys.modules[spec.name] = module; spec.loader.exec_module(module)
    fused.fused_kernel = MADE[name] = module.fused_kernel


MADE = {}


def forward(case, config, keep=False, final=False):
    plan = S.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, INF), config=config or S.DEFAULT)
    ops = S.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
    return lambda: S.run_forward(prepared.Recording(None), plan, ops, return_final_states=final, keep=keep, config=config)



OLD_W = '''        weights = _next_weights(which, tiles, item, end, OUT, STAGES)
        tma.store_wait(0)  # before a barrier that the output's tile is written after
        weights_tile.store(weights)
        fence_async_shared()
'''
V5 = [
    (OLD_W, ""),
    ("    for item in range(own, end):\n        stage = item % STAGES\n        # What", '''    weights = _next_weights(which, tiles, own, end, OUT, STAGES)
    for item in range(own, end):
        stage = item % STAGES
        tma.store_wait(0)  # before a barrier that the output's tile is written after
        weights_tile.store(weights)
        fence_async_shared()
        # What'''),
    ('''        y = warpgroup_mma_wait(1, deps=(y,))
        if HAS_Z''', '''        # While these products are made, the next chunk's weights.
        weights = _next_weights(which, tiles, item + 1, end, OUT, STAGES)
        y, state = warpgroup_mma_wait(0, deps=(y, state))
        if HAS_Z'''),
    ('''        state = warpgroup_mma_wait(0, deps=(state,))
        mbarrier.arrive(empty.index(stage), count=1)
    tma.store_wait(0)
''', '''        mbarrier.arrive(empty.index(stage), count=1)
    tma.store_wait(0)
'''),
]
FORCED = [('''        y = warpgroup_mma_wait(0, deps=(y,))
        y = y * since_start''', '''        y, state, scaled = warpgroup_mma_wait(0, deps=(y, state, scaled))
        y = y * since_start''')]
SIMPLE_STATE = [('''    scaled, following = _own_operand(which, tiles, 0, own, LEFT, STATE, STAGES)
    for item in range(0, own):
        stage = item % STAGES
''', '''    for item in range(0, own):
        stage = item % STAGES
        scaled, following = _own_operand(which, tiles, item, own, LEFT, STATE, STAGES)
'''), ('''        # While the product is made, the next one's operand.
        scaled, following = _own_operand(which, tiles, item + 1, own, LEFT, STATE, STAGES)
''', '')]
DEEP = [('''    own = gl.load(slots)
    log_decay = gl.load(decays)
    if not WIDE:
        next_own = gl.load(slots + gl.minimum(1, last) * SIZE)
        next_decay = gl.load(decays + gl.minimum(1, last))
    for k in range(0, segment):
        if WIDE:
            next_own = gl.load(slots + gl.minimum(k + 1, last) * SIZE)
            next_decay = gl.load(decays + gl.minimum(k + 1, last))
        else:
            then_own = gl.load(slots + gl.minimum(k + 2, last) * SIZE)
            then_decay = gl.load(decays + gl.minimum(k + 2, last))
        own = state_from_flat(own, BLOCK_N, STATE)
        state = state * gl.exp2(log_decay)[:, None] + own.to(gl.float32)
        own = next_own
        log_decay = next_decay
        if not WIDE:
            next_own = then_own
            next_decay = then_decay
''', '''    for base in range(0, segment, 4):
        own_0 = gl.load(slots + base * SIZE)
        own_1 = gl.load(slots + gl.minimum(base + 1, last) * SIZE)
        own_2 = gl.load(slots + gl.minimum(base + 2, last) * SIZE)
        own_3 = gl.load(slots + gl.minimum(base + 3, last) * SIZE)
        decay_0 = gl.exp2(gl.load(decays + base))
        decay_1 = gl.exp2(gl.load(decays + gl.minimum(base + 1, last)))
        decay_2 = gl.exp2(gl.load(decays + gl.minimum(base + 2, last)))
        decay_3 = gl.exp2(gl.load(decays + gl.minimum(base + 3, last)))
        state = state * decay_0[:, None] + state_from_flat(own_0, BLOCK_N, STATE).to(gl.float32)
        if base + 1 < segment:
            state = state * decay_1[:, None] + state_from_flat(own_1, BLOCK_N, STATE).to(gl.float32)
        if base + 2 < segment:
            state = state * decay_2[:, None] + state_from_flat(own_2, BLOCK_N, STATE).to(gl.float32)
        if base + 3 < segment:
            state = state * decay_3[:, None] + state_from_flat(own_3, BLOCK_N, STATE).to(gl.float32)
''')]
REVERSED = [
    ("            t = (first + item) * _Q\n", "            t = (first + own - 1 - item) * _Q\n"),
    ("    raw = _raw_steps(steps, heads, first * _Q + q, seqlen)\n", "    raw = _raw_steps(steps, heads, (first + gl.maximum(own - 1, 0)) * _Q + q, seqlen)\n    suffix = gl.full([2], 0.0, gl.float32, layout=gl.SliceLayout(1, ROWS))\n"),
    ("        t = (first + gl.where(item < own, item, item - own)) * _Q + q\n", "        t = (first + gl.where(item < own, own - 1 - item, item - own)) * _Q + q\n"),
    ("        following = (first + gl.where(item + 1 < own, item + 1, item + 1 - own)) * _Q + q\n", "        following = (first + gl.where(item + 1 < own, own - 2 - item, item + 1 - own)) * _Q + q\n"),
    ("        rows = _decay_rows(\n            raw, t < seqlen, q == _Q - 1, A2, bias, limits, HAS_BIAS, SOFTPLUS\n        )  # fmt: skip\n        raw = next_raw\n",
     "        rows = _decay_rows(\n            raw, t < seqlen, q == _Q - 1, A2, bias, limits, suffix, HAS_BIAS, SOFTPLUS\n        )  # fmt: skip\n        raw = next_raw\n        suffix = gl.where(item + 1 < own, suffix + rows[4], 0.0)\n"),
    ("    raw, inside, last, A2, bias, limits, HAS_BIAS", "    raw, inside, last, A2, bias, limits, suffix, HAS_BIAS"),
    ("    return cum, cumj, gl.exp2(cum), gl.exp2(total[:, None] - cumj)\n", "    return cum, cumj, gl.exp2(cum), gl.exp2((total + suffix)[:, None] - cumj), total\n"),
    ("        state = _decayed(state, rows_rings[2], stage, which, STATE)\n        state = warpgroup_mma(scaled, Bs.index(stage), state, is_async=True)\n        # While the product is made", "        state = warpgroup_mma(scaled, Bs.index(stage), state, is_async=True)\n        # While the product is made"),
]
VARIANTS = {"base": [], "reversed": REVERSED, "reversed, next weights": REVERSED + V5, "reversed, next weights, deep": REVERSED + V5 + DEEP, "next weights": V5, "forced": FORCED, "simple state": SIMPLE_STATE, "deep": DEEP, "next weights, deep": V5 + DEEP}

NO_WAIT = [("        if segment > 0:\n            state = _look_back", "        if segment > 99:\n            state = _look_back"), ("        if segment == nsegments - 1:\n            for which", "        if segment == nsegments + 1:\n            for which")]
ABLATIONS = {
    "no waiting for flags": NO_WAIT,
    "no own state, no waiting": NO_WAIT + [("own = gl.where(segment < nsegments - 1, count, 0)", "own = gl.where(segment < 0, count, 0)")],
    "no scores product": [("            scores = warpgroup_mma(Bs.index(stage), C, zero, use_acc=False, is_async=True)\n            scores = warpgroup_mma_wait(0, deps=(scores,))\n", "            scores = zero\n")],
    "no dt (helper does little)": [("    cum = gl.associative_scan(log_decay, 1, _sum)\n", "    cum = log_decay\n"), ("        dt = _softplus(dt)\n", "        pass\n")],
    "no exp2 of the gap": [("    decays = gl.exp2(gl.minimum(cum_i[None, :] - cumj[:, None], 126.0))", "    decays = cum_i[None, :] - cumj[:, None]")],
}
ALL = VARIANTS | ABLATIONS
CUT = ("old0", "old1", "old2", "base0", "base1", "base2", "base3", *[n for n in ALL if n != "base"])


def compile_part(name):
    """Compile what is timed, by calls; nothing is kept but Triton's cache."""
    F = lambda **k: S.Config(fused=True, **k)
    calls = {
        "old0": [((1, 512, 32), None, {}), ((1, 2048, 32), None, {})], "old1": [((1, 8192, 32), None, {}), ((1, 16384, 128), None, {})],
        "old2": [((8, 2048, 32), None, {}), ((1, 262144, 32), None, {})],
        "base0": [((1, 2048, 32), F(segments=8), {})], "base1": [((1, 512, 32), F(segments=1), {})], "base2": [((1, 262144, 32), F(segments=8), {})],
        "base3": [((1, 2048, 32), F(segments=8), {"z": True})],
    }.get(name)
    if calls is None: variant(name); calls = [((1, 2048, 32), F(segments=8), {})]
    for shape, config, extra in calls: forward(inputs(*shape, **extra), config)()
    torch.cuda.synchronize()


def zero():
    for t in flags._streams.values(): t.zero_()
    for known in flags._graphs.values(): known.zeros.zero_()


def main_timing():
    found = {}
    def row(label, shape, ways, **extra):
        case = inputs(*shape, **extra); got = found.setdefault(label, {})
        for way, (name, config) in ways.items():
            try:
                if name: variant(name)
                got[way] = replay_us(forward(case, config))
            except Exception as e: got[way] = repr(e)[:200]
            if name in ABLATIONS: zero()
        print(f"{label:24}", {k: round(v, 2) if isinstance(v, float) else v for k, v in got.items()}, flush=True)
        (OUT / "ssd_fused.json").write_text(json.dumps(found, indent=1))
        del case; torch.cuda.empty_cache()
    F = lambda n, **k: S.Config(fused=True, segments=n, **k)
    both = lambda *counts: {"old": (None, None), **{f"{n}": ("base", F(n)) for n in counts}}
    for shape, counts in {(1, 2048, 32): (8,), (1, 8192, 32): (8,), (1, 32768, 32): (8,), (1, 131072, 32): (8,), (1, 512, 32): (1, 4, 8)}.items(): row(str(shape), shape, both(*counts))
    names = [n for n in VARIANTS if n != "base"]
    for L in (2048, 8192, 32768, 131072): row(f"variants {L}", (1, L, 32), {n: (n, F(8)) for n in ("base", *names)})
    for n in names:  # right?
        case = inputs(1, 2048, 8, start=True); variant(n)
        want = S.ssd_forward(**case, return_final_states=True, keep=False, config=S.Config(segments=8))
        got = S.ssd_forward(**case, return_final_states=True, keep=False, config=F(8))
        print("difference from four launches", n, max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got[:2], want[:2])), flush=True)
    for shape, counts in {(1, 4096, 32): (8,), (1, 16384, 32): (8,), (1, 1048576, 32): (8,), (8, 2048, 32): (1,), (1, 16384, 128): (1, 2), (1, 1024, 32): (4, 8), (1, 2048, 8): (8, 16, 32), (1, 2048, 80): (3,), (1, 524288, 32): (8,), (1, 2048, 32): (4, 6), (1, 8192, 128): (1, 2)}.items():
        row(str(shape), shape, both(*counts))
    for L in (512, 2048, 8192): row(f"ablations {L}", (1, L, 32), {n: (n, F(8)) for n in ABLATIONS})
    for L in (2048, 8192): row(f"z {L}", (1, L, 32), both(8), z=True)
    variant("base")
    from torch.profiler import ProfilerActivity, profile
    for shape in ((1, 512, 32), (1, 2048, 32), (1, 8192, 32)):
        for name, config in (("old", None), ("fused", F(8))):
            call = forward(inputs(*shape), config); call(); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
            held = call(); torch.cuda.synchronize(); peak = torch.cuda.max_memory_allocated() - before; del held
            with profile(activities=[ProfilerActivity.CUDA]) as p:
                for _ in range(20): call(); torch.cuda.synchronize()
            got = {e.key: round(e.self_device_time_total / 20, 2) for e in p.key_averages() if e.self_device_time_total}
            found[f"kernels {shape} {name}"] = got | {"peak MiB": peak / 2**20}; print("kernels", shape, name, round(peak / 2**20, 2), "MiB", got, flush=True)
    chosen = S.choose; case = inputs(1, 512, 32)
    for name, choice in (("old", chosen), ("fused", lambda plan, keep=True: S.Config(fused=True))):
        S.choose = choice; hopper_op._calls.clear()
        call = lambda: hopper_op.ssd(**case, chunk_size=64, segments=1 if name == "old" else 4)
        for _ in range(20): call()
        times = []
        for _ in range(300):
            torch.cuda.synchronize(); t = time.perf_counter(); call(); times.append(time.perf_counter() - t)
        found[f"host {name}"] = sorted(times)[150] * 1e6; print("host us", name, round(found[f"host {name}"], 1), flush=True)
    (OUT / "ssd_fused.json").write_text(json.dumps(found, indent=1))


def main():
    begin = time.time()
    def part(name):
        t = time.time()
        try: done = subprocess.run([sys.executable, __file__, "compile", name], timeout=60, capture_output=True, text=True); code = done.returncode; said = done.stderr[-300:] if code else ""
        except subprocess.TimeoutExpired: code, said = "timeout", ""
        print(f"compiled {name}: {code} {time.time() - t:.0f} s {said}", flush=True)
    with ThreadPoolExecutor(16) as pool: list(pool.map(part, CUT))
    try: subprocess.run([sys.executable, __file__, "time"], timeout=75)
    except subprocess.TimeoutExpired: print("the timing ran past its limit")
    print("seconds", round(time.time() - begin))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        setup()
        compile_part(sys.argv[2]) if sys.argv[1] == "compile" else main_timing()
    else: main()
