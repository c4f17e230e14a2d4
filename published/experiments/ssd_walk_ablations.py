"""SSD forward on Hopper, the walk behind the first launch: ablations (their results are wrong), clocks, and cache hints on its copies by edits of the PTX.

python3 ssd_walk_ablations.py, from the root of commit 6db7bc6, whose source it changes in copies under /tmp; some minutes. $OUT/ablate.jsonl, and
ncu's bytes printed. Merged from the scripts that ran, in this form not run on a GPU. "make" as its argument: only the changed copies, no GPU.
"""
import json, math, os, re, shutil, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
HERE = os.getcwd()
W, PR, S_, PA = "hopper_walk_kernel.py", "hopper_walk_producer.py", "hopper_ssd.py", "hopper_parts.py"
NORESET = [(PR, "        if segment == nsegments - 1:\n            for which", "        if segment == nsegments + 1:\n            for which")]
NOLOOK = [(W, "        if segment > 0:\n            state = look_back", "        if segment > 1000:\n            state = look_back"), *NORESET]
OUT1 = [(W, "row = [b, h, (first + c) * _Q, channel]", "row = [b, h, (first + c % 2) * _Q, channel]")]
NOOWN = [(W, "own = gl.where(segment < nsegments - 1, count, 0)", "own = gl.where(segment < nsegments - 1000, count, 0)")]
NOPREP = [(S_, "    recording.launch(prepare_kernel, grid, arguments, constants, **options)\n    return cum, cumj, scores",
  "    k = (plan.batch, plan.nchunks, plan.nheads)\n    if k not in _KEPT:\n        recording.launch(prepare_kernel, grid, arguments, constants, **options)\n        _KEPT[k] = (cum, cumj, scores)\n    return _KEPT[k]"),
  (S_, "_BLOCK_H = 8\n", "_BLOCK_H = 8\n_KEPT = {}\n")]
PDL = [(S_, '"num_warps": 4, "launch_pdl": False}', '"num_warps": 4, "launch_pdl": True}'), (PA, "    if PDL:\n        cuda.gdc_launch_dependents()\n    chunk = tl.program_id(0)", "    if PDL:\n        cuda.gdc_launch_dependents()\n        cuda.gdc_wait()\n    chunk = tl.program_id(0)")]
STAMP = '''
@gluon.jit
def _stamp(stamps, which: gl.constexpr, k):
    clock = gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=gl.int64, is_pure=False, pack=1)
    block = (gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)) * gl.num_programs(0) + gl.program_id(0)
    gl.store(stamps + (block * 2 + which) * 128 + k, clock)


@gluon.jit
def _own_operand('''
CLOCKS = [
 (W, "\n@gluon.jit\ndef _own_operand(", STAMP),
 (W, "    _D_ptr, start, slots, decays, flags, _final, npairs = work[0]\n    b, pair, segment, nsegments, _first, own, _count, _sizes = work[1]\n    P: gl", "    _D_ptr, start, slots, decays, flags, _final, npairs = work[0]\n    b, pair, segment, nsegments, _first, own, _count, _sizes = work[1]\n    _stamp(_final, which, 0)\n    P: gl"),
 (W, "            FLAT: gl.constexpr = flat_layout(BLOCK_N)\n            left", "            _stamp(_final, which, 1)\n            FLAT: gl.constexpr = flat_layout(BLOCK_N)\n            left"),
 (W, "            publish(flags + segment)\n", "            publish(flags + segment)\n            _stamp(_final, which, 2)\n"),
 (W, "    p = channel + gl.arange(0, _P, layout=gl.SliceLayout(1, OUT))\n    skip = p\n", "    _stamp(final, which, 3)\n    p = channel + gl.arange(0, _P, layout=gl.SliceLayout(1, OUT))\n    skip = p\n"),
 (W, "        row = [b, h, (first + c) * _Q, channel]\n", "        row = [b, h, (first + c) * _Q, channel]\n        _stamp(final, which, 8 + c)\n"),
 (W, "    if final is not None:  # noqa: SIM102 of compile time, the other is not\n        if segment == nsegments - 1:\n            if MILD:", "    _stamp(final, which, 4)\n    if final is not None:  # noqa: SIM102 of compile time, the other is not\n        if segment == nsegments + 1:\n            if MILD:"),
 (S_, "            recording, plan, tensors, (cum, cumj, scores), results, sizes=sizes,", "            recording, plan, tensors, (cum, cumj, scores), (results[0], STAMPS), sizes=sizes,"),
 (S_, "_BLOCK_H = 8\n", "_BLOCK_H = 8\nSTAMPS = torch.zeros(132 * 2 * 128, dtype=torch.int64, device='cuda')\n"),
]

NOBCS = [(PR, "            mbarrier.expect(bar, more_bytes * _Q)\n", "            mbarrier.expect(bar, 0)\n"),
 (PR, "            mbarrier.expect(bar, (row_bytes + more_bytes) * _Q)\n            _fetch_x_and_B(tiles, sources, work, stage, c, P)\n", "            mbarrier.expect(bar, (2 * _P * itemsize + 16) * _Q)\n            _fetch_x(tiles, sources, work, stage, c, P)\n"),
 (PR, "        tma.async_copy_global_to_shared(C_desc, [b, group, t, 0], bar, Cs.index(stage))\n        scores = scores_ring.index(stage)\n        tma.async_copy_global_to_shared(scores_desc, [scores_row + t, 0], bar, scores)\n", ""),
 (PR, "\n@gluon.jit\ndef _fetch_sums(", """
@gluon.jit
def _fetch_x(tiles, sources, work, stage, c, P: gl.constexpr):
    xs, _zs, Bs, _Cs, _scores, _cums, _weights, _outs, full, _empty = tiles
    _out_desc, x_desc, _z, B_desc, _C, _scores_desc, _cum, _cumj, _nchunks = sources
    b, pair, _segment, _nsegments, first, _own, _count, sizes = work[1]
    _nheads, pairs_per_group, heads_per_group = sizes
    bar = full.index(stage)
    t = (first + c) * _Q
    for which in gl.static_range(2):
        h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
        x = xs.index(stage * 2 + which)
        tma.async_copy_global_to_shared(x_desc, [b, h, t, channel], bar, x)


@gluon.jit
def _fetch_sums(""")]
NOSTORE = [(W, "    tma.async_copy_shared_to_global(out_desc, row, out_tile)\n", "")]
NOSC = [(W, "    y = warpgroup_mma(entering, C.permute((1, 0)), zero, use_acc=False, is_async=True)\n", "    y = zero\n")]
NOXB = [(W, "        state = warpgroup_mma(scaled, B, state, is_async=True)\n        since_middle", "        since_middle")]
NOEPI = [(W, "    out_tile.permute((1, 0)).store(y.to(dtype))\n    fence_async_shared()\n", "    if row[2] < 0:\n        out_tile.permute((1, 0)).store(y.to(dtype))\n    fence_async_shared()\n"), *NOSTORE]
ONE = [("hopper_kernel.py", "mbarrier.init(empty.index(i), count=2)", "mbarrier.init(empty.index(i), count=1)"),
  (W, "def _consumer_1(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):\n    _consumer(1,", "def _consumer_1(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):\n    if work[1][0] < 0:\n        _consumer(1,")]
TICK = """
@gluon.jit
def _tick():
    return gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _note(stamps, which: gl.constexpr, k, t):
    block = (gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)) * gl.num_programs(0) + gl.program_id(0)
    gl.store(stamps + (block * 2 + which) * 256 + k, t.to(gl.int64))


@gluon.jit
def _own_operand("""
TICKS = [
 (W, "\n@gluon.jit\ndef _own_operand(", TICK),
 (W, "    # What enters the chunk, before the chunk's own part: S C^T.\n", "    t1 = _tick()\n"),
 (W, "        state = warpgroup_mma(scaled, B, state, is_async=True)\n        since_middle = gl.exp2(cum_i - middle)\n", "        state = warpgroup_mma(scaled, B, state, is_async=True)\n        t2 = _tick()\n        since_middle = gl.exp2(cum_i - middle)\n"),
 (W, "        gl.thread_barrier()\n        y = warpgroup_mma_wait(1, deps=(y,))\n", "        gl.thread_barrier()\n        t3 = _tick()\n        y = warpgroup_mma_wait(1, deps=(y,))\n        t4 = _tick()\n"),
 (W, "    state = warpgroup_mma_wait(0, deps=(state,))\n    return state\n", "    t5 = _tick()\n    state = warpgroup_mma_wait(0, deps=(state,))\n    t6 = _tick()\n    if MILD:\n        k = (row[2] // _Q) % 16 * 8\n        _note(stamps, which, k + 1, t1)\n        _note(stamps, which, k + 2, t2)\n        _note(stamps, which, k + 3, t3)\n        _note(stamps, which, k + 4, t4)\n        _note(stamps, which, k + 5, t5)\n        _note(stamps, which, k + 6, t6)\n    return state\n"),
 (W, "    SIZES: gl.constexpr, FEATURES: gl.constexpr, MILD: gl.constexpr,\n):", "    SIZES: gl.constexpr, FEATURES: gl.constexpr, MILD: gl.constexpr, stamps=None,\n):"),
 (W, "stage, middle, SIZES, FEATURES, True\n", "stage, middle, SIZES, FEATURES, True, final\n"),
 (W, "        mbarrier.wait(full.index(stage), fill & 1)\n        row = [b, h, (first + c) * _Q, channel]\n", "        _note(final, which, c % 16 * 8, _tick())\n        mbarrier.wait(full.index(stage), fill & 1)\n        _note(final, which, c % 16 * 8 + 7, _tick())\n        row = [b, h, (first + c) * _Q, channel]\n"),
 (W, "        if segment == nsegments - 1:\n            if MILD:", "        if segment == nsegments + 1:\n            if MILD:"),
 (S_, "            recording, plan, tensors, (cum, cumj, scores), results, sizes=sizes,", "            recording, plan, tensors, (cum, cumj, scores), (results[0], STAMPS), sizes=sizes,"),
 (S_, "_BLOCK_H = 8\n", "_BLOCK_H = 8\nSTAMPS = torch.zeros(132 * 2 * 256, dtype=torch.int64, device='cuda')\n"),
]
X2 = [("hopper_walk_producer.py", "            _fetch_x_and_B(tiles, sources, work, stage, c, P)\n            _fetch_sums(tiles, sources, work, stage, c, P)\n        t =", "            _fetch_x_and_B(tiles, sources, work, stage, c % 2, P)\n            _fetch_sums(tiles, sources, work, stage, c, P)\n        t =")]
V = {"base": [], "no look": NOLOOK, "no own": NOLOOK + NOOWN, "no look, out one place": NOLOOK + OUT1, "no own, out one place": NOLOOK + NOOWN + OUT1,
     "prepare under PDL": PDL, "no prepare, no look": NOPREP + NOLOOK, "no look, no BCs": NOLOOK + NOBCS, "no look, no SC": NOLOOK + NOSC,
     "no look, no XB": NOLOOK + NOXB, "no look, no BCs, no own": NOLOOK + NOOWN + NOBCS, "no look, no epilogue": NOLOOK + NOEPI, "no look, one consumer": NOLOOK + ONE,
     "cooperative": [("hopper_walk.py", "num_warps=4, launch_pdl=pdl)", "num_warps=4, launch_pdl=pdl, launch_cooperative_grid=True)")],
     "x2 one place": X2, "out one place": OUT1, "both one place": X2 + OUT1, "clocks": CLOCKS, "clocks, out one place": CLOCKS + OUT1, "cycles": TICKS}
FIRST, LAST = "0x12F0000000000000", "0x14F0000000000000"
FRAC = lambda kind, f: f"createpolicy.fractional.L2::{kind}.b64 pp, {f};"
# keys: x1 (first walk, early and loop), x2 (second walk), b1, b2, c, s (scores), r (rows of sums), out
HINTS = {
    "base": {},
    "out first": dict(out=FIRST),
    "x2 first": dict(x2=FIRST),
    "x1 last": dict(x1=LAST),
    "x1 last, x2 first": dict(x1=LAST, x2=FIRST),
    "x1 last, x2 first, out first": dict(x1=LAST, x2=FIRST, out=FIRST),
    "x1 last, out first": dict(x1=LAST, out=FIRST),
    "all": dict(x1=LAST, x2=FIRST, out=FIRST, b1=LAST, b2=LAST, c=LAST, s=LAST, r=LAST),
    "x1 half last, x2 first, out first": dict(x1=FRAC("evict_last", 0.5), x2=FIRST, out=FIRST),
    "out unchanged": dict(out=FRAC("evict_unchanged", 1.0)),
}
def patch(ptx, policy):
    loads = [i for i, l in enumerate(ptx) if "cp.async.bulk.tensor.4d.shared" in l or "cp.async.bulk.tensor.2d.shared" in l]
    reg = lambda i: re.search(r"\], \[(%rd\d+), \{", ptx[i])[1]
    order = []
    for i in loads:
        if reg(i) not in order: order.append(reg(i))
    B, x, cum, cumj, C, scores = order
    seen, kinds = {}, {}
    for i in loads:
        r = reg(i); seen[r] = seen.get(r, 0) + 1; n = seen[r]
        kinds[i] = {B: "b1" if n <= 4 else "b2", x: "x1" if n <= 4 else "x2", cum: "r", cumj: "r", C: "c", scores: "s"}[r]
    assert seen[B] == 6 and seen[x] == 6 and seen[C] == 2 and seen[scores] == 1, seen
    for i, l in enumerate(ptx):
        if "cp.async.bulk.tensor.4d.global.shared" in l: kinds[i] = "out"
    for i, kind in kinds.items():
        p = policy.get(kind)
        if p is None: continue
        set_ = f"mov.b64 pp, {p};" if p.startswith("0x") else p
        l = ptx[i].replace("mbarrier::complete_tx::bytes [", "mbarrier::complete_tx::bytes.L2::cache_hint [").replace("cta.bulk_group [", "cta.bulk_group.L2::cache_hint [").rstrip().rstrip(";")
        ptx[i] = "{ .reg .b64 pp; " + set_ + l + ", pp; }"
    return ptx
def hook(policy):
    from triton import knobs
    def add(self, stages, options, language, capability):
        made = stages["ptx"]
        def ptx(src, metadata):
            text = made(src, metadata)
            return "\n".join(patch(text.split("\n"), policy)) if ".entry walk_kernel" in text else text
        stages["ptx"] = ptx
    knobs.runtime.add_stages_inspection_hook = add
def make(name):
    to = Path("/tmp/src_" + re.sub(r"\W", "_", name))
    if not to.exists():
        shutil.copytree(HERE, to, ignore=shutil.ignore_patterns(".git", ".peers", "published", "runs"), symlinks=True)
        (to / "published").mkdir(exist_ok=True); shutil.copytree(Path(HERE) / "published/experiments", to / "published/experiments")
        for file, a, b in V.get(name, []):
            p = to / "kernels/ssd" / file; s = p.read_text(); assert a in s, (name, a); p.write_text(s.replace(a, b))
    return str(to)
if len(sys.argv) > 1:
    mode, name = (sys.argv[1:] + [""])[:2]
    if mode == "make": [print(make(n)) for n in V]; sys.exit()
    if HINTS.get(name): hook(HINTS[name])
    sys.path.insert(0, "published/experiments"); sys.path.insert(0, "tests/kernels/ssd")
    from parts import load_package, replay_us, ssd_inputs as inputs
    load_package()
    import torch
    from mambench.kernels import prepared
    from mambench.kernels.ssd import hopper_ssd as S
    torch.set_grad_enabled(False)
    def forward(case, **k):
        config = S.Config(look_back=True, **k)
        plan = S.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, math.inf), config=config, keep=False)
        ops = S.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
        return lambda: S.run_forward(prepared.Recording(None), plan, ops, return_final_states=False, keep=False, config=config)
    if mode == "ncu":
        call = forward(inputs(1, 8192, 32))
        for _ in range(6): call()
        torch.cuda.synchronize(); sys.exit()
    if mode == "compile":
        forward(inputs(1, 8192, 32))(); torch.cuda.synchronize()
        sys.exit()
    if "clocks" in name:
        call = forward(inputs(1, 8192, 32)); rows = []
        for i in range(8):
            for _ in range(4): call()
            torch.cuda.synchronize()
            t = S.STAMPS.view(132, 2, 128)[:128].view(8, 16, 2, 128).double()  # segment, pair, which
            begin = t[..., 0].min()
            s = (t - begin) / 1e3
            rows.append([[round(float(s[g, :, :, k].median()), 1) for k in (0, 1, 2, 3, *range(8, 24), 4)] for g in range(8)])
        m = torch.tensor(rows).median(0).values
        for g in range(8): print(f"{name} segment {g}: begin, made, set, looked; chunks; end", [round(float(v), 1) for v in m[g]], flush=True)
        print(name, "last end", max(r[-1] for r in m.tolist()))
        sys.exit()
    if name == "cycles":
        call = forward(inputs(1, 8192, 32))
        for _ in range(4): call()
        torch.cuda.synchronize()
        t = S.STAMPS.view(132, 2, 256)[:128, :, :128].view(8, 16, 2, 16, 8)  # segment, pair, which, chunk, tick
        for g in (0, 3, 7):
            for w in (0, 1):
                v = t[g, :, w, 1:15]  # pair, chunk, tick
                order = [0, 7, 1, 2, 3, 4, 5, 6]
                v = v[..., order]; d = ((v[..., 1:] - v[..., :-1]) % (1 << 32)).double()
                nxt = ((t[g, :, w, 2:16, 0] - t[g, :, w, 1:15, 6]) % (1 << 32)).double()
                print(f"segment {g} consumer {w}: full, begin(1), issued(2), free(3), y(4), stored(5), state(6):", [round(float(x)) for x in d.reshape(-1, 7).median(0).values], "to next", round(float(nxt.median())), "chunk", round(float(((t[g, :, w, 2:16, 0] - t[g, :, w, 1:15, 0]) % (1 << 32)).double().median())), flush=True)
        off = ((t[:, :, 1, :, 0] - t[:, :, 0, :, 0] + (1 << 31)) % (1 << 32) - (1 << 31)).double()
        print("consumer 1 behind consumer 0 at a chunk's start, cycles:", [round(float(x)) for x in off.flatten().quantile(torch.tensor([.1, .25, .5, .75, .9], dtype=torch.float64, device="cuda"))])
        sys.exit()
    row = {L: round(replay_us(forward(inputs(1, L, 32)), 0.02), 2) for L in (4096, 8192, 16384, 32768)}
    row["8192 again"] = round(replay_us(forward(inputs(1, 8192, 32)), 0.02), 2)
    print(f"{name:34}", json.dumps(row), flush=True)
    with open(OUT / "ablate.jsonl", "a") as f: f.write(json.dumps({"name": name, **row}) + "\n")
    sys.exit()
begin = time.time()
def part(mode, name, limit, prefix=()):
    env = dict(os.environ, TRITON_CACHE_DIR="/tmp/tc_" + re.sub(r"\W", "_", name))
    try: done = subprocess.run([*prefix, sys.executable, os.path.abspath(__file__), mode, name], timeout=limit, capture_output=True, text=True, cwd=make(name), env=env); code, said = done.returncode, done.stdout + (done.stderr[-900:] if done.returncode else "")
    except subprocess.TimeoutExpired as e: code, said = "timeout", (e.stdout or b"").decode()
    if mode == "ncu": return said
    if code or said: print(said.rstrip() if code == 0 else f"{mode} {name} exit {code} {said}", flush=True)
NAMES = list(V | HINTS)
for n in NAMES: make(n)
with ThreadPoolExecutor(10) as pool: list(pool.map(lambda n: part("compile", n, 60), NAMES))
print("compiled", round(time.time() - begin), flush=True)
for name in [*NAMES, *[n for n in NAMES if n not in ("cycles", "clocks", "clocks, out one place")]]: part("time", name, 20)
for name in ("base", "x2 first", "x1 last, x2 first", "out first", "x1 last, x2 first, out first", "all"):
    said = part("ncu", name, 40, ("ncu", "--cache-control", "none", "--clock-control", "none", "-k", "regex:walk_kernel", "--launch-skip", "4", "--launch-count", "1", "--csv", "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sectors_op_read.sum,lts__t_sectors_op_write.sum,gpu__time_duration.sum"))
    rows = [l.split('","') for l in said.splitlines() if "walk_kernel" in l]
    print(f"ncu {name:34}", [(r[-3].strip('"'), r[-2], r[-1].strip('"')) for r in rows] or said[-300:], flush=True)
print("seconds", round(time.time() - begin), flush=True)
