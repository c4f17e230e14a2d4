"""Selective scan forward on Hopper, time over lanes: what a warp waits for from state to state, and what each configuration takes.

python3 s6_forward_chain.py turns | steps | rounds, from the root of the repository at commit 4e90950: variants of its kernel by s6_forward_turns.patch and s6_forward_chain.patch,
whose switches the environment sets; two minutes each. $OUT/s6.jsonl: microseconds, twice, and whether the bits are those of the first variant (or the largest difference over the
largest output). Turns with 128 states are wrong: A is overwritten there while others read it. "choices", of any commit since: every configuration that `choose` may take, checked
against each other and timed, with and without states kept for a backward; half a minute. "few", of any commit since: few channels, of which 16, 8 or 4 share a block,
and a gate. $OUT/choices.json, $OUT/few.json. Of the record, times_ms are of "choices" at commit 6d6b757 and, where last_us has them, of its variant "nonextlate", which the commit after it is.
"""
import json, os, runpy, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE, OUT = Path.cwd(), Path(os.environ.get("OUT", "/tmp/out"))
ONE, TWO, NARROW = "Config(channels=1, warps=16)", "Config(channels=2, warps=8)", "Config(channels=1, warps=16, wide=False)"
T = lambda turns, held, first, config=ONE: ("turns", dict(S6_TURNS=turns, S6_HELD=held, S6_FIRST_B=first), config)
C = lambda held, scan, early, bar, tail, config=ONE: ("chain", dict(S6_HELD=held, S6_SCAN=scan, S6_EARLY=early, S6_BAR=bar, S6_TAIL=tail, S6_NEXT=0), config)
R = lambda scan, ahead, config=ONE: ("chain", dict(S6_SCAN=scan, S6_NEXT=ahead), config)
# turns: every so many states; A from 1 lanes, 2 shared memory; B before the turn. rounds: 2 products of decays ahead of the ends, 3 radix 4, 4 both.
VARIANTS = {
    "turns": {"base1": T(0, 0, 0), "base2": T(0, 0, 0, TWO), "held1": T(0, 1, 0), "held2": T(0, 2, 0), "t1a": T(1, 2, 0), "t1b": T(1, 2, 1), "t2b": T(2, 2, 1), "t4b": T(4, 2, 1), "t16b": T(16, 2, 1),
              "t1b_narrow": T(1, 2, 1, NARROW), "t1a_narrow": T(1, 2, 0, NARROW), "t1a_2ch": T(1, 2, 0, TWO), "t1b_2ch": T(1, 2, 1, TWO), "t4b_2ch": T(4, 2, 1, TWO)},
    "steps": {"off": C(0, 0, 0, 0, 0), "held": C(1, 0, 0, 0, 0), "scan": C(0, 1, 0, 0, 0), "held,scan": C(1, 1, 0, 0, 0), "held,scan,early": C(1, 1, 1, 0, 0), "held,scan,early,bar": C(1, 1, 1, 1, 0),
              "all": C(1, 1, 1, 1, 1), "all_narrow": C(1, 1, 1, 1, 1, NARROW), "all_2ch": C(1, 1, 1, 1, 1, TWO), "off_2ch": C(0, 0, 0, 0, 0, TWO), "off_narrow": C(0, 0, 0, 0, 0, NARROW)},
    "rounds": {"s1": R(1, 0), "s1n": R(1, 1), "s2": R(2, 0), "s2n": R(2, 1), "s3n": R(3, 1), "s4": R(4, 0), "s4n": R(4, 1), "s2n_2ch": R(2, 1, TWO), "s4n_2ch": R(4, 1, TWO), "s2n_narrow": R(2, 1, NARROW)},
}
SHAPES = [(1, 2048, 8192, 16), (1, 2048, 2048, 16), (8, 2048, 8192, 16), (1, 2048, 8192, 64), (1, 2048, 8192, 128)]
CONFIGS = {"1ch-wide": ONE, "1ch": NARROW, "wide": TWO, "k4c2": "SerialConfig()", "k4c1w2": "SerialConfig(channels=1, warps_d=2)", "k4c1": "SerialConfig(channels=1, warps_n=8, warps_d=2, tile=64)"}
CHOICES = [(1, 2048, 2048, 16), (1, 2048, 8192, 16), (1, 2048, 131072, 16), (2, 2048, 8192, 16), (4, 2048, 8192, 16), (8, 2048, 2048, 16), (8, 2048, 8192, 16), *((1, 2048, 8192, n) for n in (32, 64, 128, 256)), (1, 1024, 8192, 128)]
KEPT = 128  # steps between states that are kept


FEW = {**{f"{w} warps{' kept' if not wide else ''}": f"Config(warps={w}, wide={wide})" for wide in (True, False) for w in (16, 8, 4)}, "k4c1": CONFIGS["k4c1"], "k2": "SerialConfig(lanes=8, channels=1, tile=64)"}
FEW_SHAPES = [(1, d, 8192, n) for d in (256, 512, 1024, 1536, 2048) for n in (16, 128)]


def setup():
    global torch, scan, replay_us
    sys.path.insert(0, str(HERE / "published/experiments"))
    from parts import load_package, replay_us
    load_package()
    import torch
    from mambench.kernels.s6 import hopper_scan as scan
    torch.set_grad_enabled(False)


def inputs(b, d, l, n):
    g = torch.Generator("cuda").manual_seed(0)
    r = lambda *s: torch.randn(*s, device="cuda", generator=g)
    bf = torch.bfloat16
    return dict(u=r(b, d, l).to(bf), delta=(r(b, d, l) * 0.5).to(bf), A=-torch.exp(r(d, n) * 0.5), B=r(b, 1, n, l).to(bf), C=r(b, 1, n, l).to(bf), D=r(d), z=None, delta_bias=r(d) - 3)


def of(config): return eval(config, vars(scan))


def one(kind, name, config, check):
    """What runs in a variant's copy."""
    setup(); row = {}
    for shape in SHAPES:
        case = inputs(*shape)
        call = lambda: scan.scan_forward(**case, delta_softplus=True, config=of(config))
        y, h = (t.cpu() for t in call()[:2])
        path = Path(f"/tmp/chain_{kind}_{'_'.join(map(str, shape))}.pt")
        if not path.exists(): torch.save((y, h), path)
        want, state = torch.load(path)
        same = torch.equal(y, want) and torch.equal(h, state) or round(float((y.float() - want.float()).abs().max() / want.float().abs().max()), 6)
        row[str(shape)] = [same] if check else [round(replay_us(call, 0.03), 2), round(replay_us(call, 0.03), 2), same]
    print(f"{name:24}", json.dumps(row), flush=True)
    if not check:
        with open(OUT / "s6.jsonl", "a") as f: f.write(json.dumps({"run": kind, "name": name, "cfg": config, **row}) + "\n")


def variants(kind):
    OUT.mkdir(parents=True, exist_ok=True)
    def run(name, check):
        patch, switches, config = VARIANTS[kind][name]
        env = dict(os.environ, TRITON_CACHE_DIR=f"/tmp/tc_chain_{kind}_{name}", **{k: str(v) for k, v in switches.items()})
        done = subprocess.run([sys.executable, __file__, "one", kind, name, config, "check" if check else ""], cwd=copy(patch), env=env, capture_output=True, text=True)
        print(done.stdout.rstrip() if done.returncode == 0 else f"{name}: {done.stderr[-600:]}", flush=True)
    def copy(patch):
        to = Path(f"/tmp/chain_{patch}")
        if not to.exists():
            shutil.copytree(HERE, to, ignore=shutil.ignore_patterns(".git", ".venv", "runs"), symlinks=True)
            subprocess.run(["patch", "-p1", "-i", str(HERE / f"published/experiments/s6_forward_{patch}.patch")], cwd=to, check=True, capture_output=True)
        return to
    names = list(VARIANTS[kind])
    for n in names: copy(VARIANTS[kind][n][0])
    run(names[0], True)
    with ThreadPoolExecutor(12) as pool: list(pool.map(lambda n: run(n, True), names[1:]))
    for n in [*names, names[0]]: run(n, False)


def applicable(name, shape, every):
    n = shape[3]
    if name.startswith("k4c1") and name != "k4c1w2": return n == 128
    return n == 16 if name.startswith("k4") else True


def choices(names=None):
    """Time every configuration; each is compiled by a process of its own first."""
    if names is None:
        with ThreadPoolExecutor(12) as pool: list(pool.map(lambda n: subprocess.run([sys.executable, __file__, "compile", n], cwd=HERE), CONFIGS))
    setup(); times, wrong = {}, []
    for shape in CHOICES:
        case, want = inputs(*shape), None
        for every in (None, KEPT) if shape[3] in (16, 64, 128) else (None,):
            for name in names or CONFIGS:
                if not applicable(name, shape, every): continue
                call = lambda: scan.scan_forward(**case, delta_softplus=True, checkpoint_every=every, config=of(CONFIGS[name]))
                out = call()[0].float(); want = out if want is None else want
                if float((out - want).abs().max() / want.abs().max()) > 0.01: wrong.append(f"{name} {shape} {every}")
                if names is None: times[f"{name} {shape}" + (f" kept every {every}" if every else "")] = round(replay_us(call, 0.02) / 1e3, 5)
    if names is None:
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "choices.json").write_text(json.dumps({"device": torch.cuda.get_device_name(), "wrong": wrong, "times_ms": times}, indent=1))
        for shape in CHOICES:
            for kept in ("", f" kept every {KEPT}"): print(shape, kept, {n: times[f"{n} {shape}{kept}"] for n in CONFIGS if f"{n} {shape}{kept}" in times}, flush=True)
    print("wrong:", wrong, flush=True)


def few():
    setup(); times, wrong = {}, []
    for shape in FEW_SHAPES:
        case, want, row = inputs(*shape), None, {}
        for name, config in FEW.items():
            if shape[3] != (128 if name == "k4c1" else 16) and name[0] == "k": continue
            call = lambda: scan.scan_forward(**case, delta_softplus=True, checkpoint_every=KEPT if "kept" in name else None, config=of(config))
            out = call()[0].float(); want = out if want is None else want
            if float((out - want).abs().max() / want.abs().max()) > 0.01: wrong.append(f"{name} {shape}")
            row[name] = times[f"{name} {shape}"] = round(replay_us(call, 0.01) / 1e3, 5)
        print(shape, row, flush=True)
    for length in (2048, 8192):  # with a gate, and states kept as often as by the operation
        case = inputs(1, 2048, length, 16); case["z"] = case["u"].flip(-1).contiguous()
        for every in (None, 64):
            for name in ("1ch-wide", "1ch", "wide"):
                call = lambda: scan.scan_forward(**case, delta_softplus=True, checkpoint_every=every, config=of(CONFIGS[name]))
                call(); times[f"{name} (1, 2048, {length}, 16) gated{' kept every 64' if every else ''}"] = round(replay_us(call, 0.01) / 1e3, 5)
    print({k: v for k, v in times.items() if "gated" in k})
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "few.json").write_text(json.dumps({"device": torch.cuda.get_device_name(), "wrong": wrong, "times_ms": times}, indent=1))
    print("wrong:", wrong)


if __name__ == "__main__":
    if sys.argv[1] == "one": one(*sys.argv[2:5], sys.argv[5] == "check")
    elif sys.argv[1] == "compile": choices([sys.argv[2]])
    elif sys.argv[1] in ("choices", "few"): globals()[sys.argv[1]]()
    else: variants(sys.argv[1])
