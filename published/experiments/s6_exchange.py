"""Selective scan backward on Hopper, up to 16 states: gradients, time, and the cycles of each phase of a chunk. From the repository root, one H100, about 45 s:

    python3 published/experiments/s6_exchange.py

Compiles and checks beside each other, then times the kernel as it is, with its sums in scratch memory, with segments in one part, and with clocks planted in it.
Writes $OUT/s6_exchange_<part>.json, the table comes last.
"""
import dataclasses, importlib.util, json, os, sys, time
from pathlib import Path

from parts import S6_NAMES as NAMES, Found, finish, graph_ms, kernels, load_package, relative, s6_prepared as prepared, s6_reference as reference, s6_tensors as tensors, start

T0 = time.time()
OUT = Path(os.environ.get("OUT", "out")); OUT.mkdir(parents=True, exist_ok=True)
LIMIT = float(os.environ.get("LIMIT", 60))
FORMS = ("as it is", "scratch", "one part", "clocks")
SHAPES = ((1, 2048), (1, 8192), (8, 2048))
PHASES = ("staging", "notes", "adding up", "tiles", "counting", "outputs")
BLOCKS, CHUNKS, MARKS = 256, 16, 8
# batch, d_inner, seqlen, ngroups, d_state, dtype, z, D, bias, softplus, last-state gradient, segments
CHECKS = [(1, 256, 1024, 1, 16, "bfloat16", 0, 1, 1, 1, 1, None), (9, 2048, 192, 1, 16, "bfloat16", 0, 1, 1, 1, 1, None), (3, 192, 640, 1, 9, "float32", 0, 1, 1, 1, 1, 2),
          (2, 40, 301, 2, 16, "bfloat16", 1, 1, 1, 1, 1, 3), (2, 128, 416, 1, 16, "bfloat16", 0, 1, 1, 1, 0, 2), (2, 128, 512, 1, 16, "float16", 1, 0, 1, 1, 1, 4)]
CLOCK = '''@gluon.jit
def mark(counter_ptr, base, iteration, k: gl.constexpr):
    now = gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r,r", [iteration], dtype=gl.int32, is_pure=False, pack=1)
    gl.store(counter_ptr + base + (gl.program_id(0) * 16 + iteration) * 8 + k, now)


'''
# what is planted, and before what: marks 0 to 7
PLANTED = [
    (CLOCK, "@gluon.jit\ndef load_states("),
    ("    marks = (rows * ngroups + ngroups * blocks_per_group) * 64\n", "    WORDS: gl.constexpr = CHUNK * WORD // 4"),
    ("            mark(counter_ptr, marks, iteration, 0)\n", "            left = count - 1 - back\n"),
    ("            mark(counter_ptr, marks, iteration, 1)\n", "            # the sums of the chunk before, at first none"),
    ("            mark(counter_ptr, marks, iteration, 2)\n", "            if not IN_PLACE:\n                slot = "),
    ("            mark(counter_ptr, marks, iteration, 3)\n", "            for tile_back in range(TILES):\n"),
    ("            mark(counter_ptr, marks, iteration, 4)\n", "            # the inputs again\n"),
    ("            mark(counter_ptr, marks, iteration, 5)\n", "            iteration += 1\n"),
    ("            mark(counter_ptr, marks, iteration - 1, 6)\n", "            if IN_PLACE:  # noqa: SIM102 (known when compiling)\n                if has_held:\n"),
    ("    mark(counter_ptr, marks, iteration - 1, 7)\n", "    # what a row has summed up goes"),
]


def launcher(form):
    """Return `hopper_backward` in a form; with clocks it keeps its last run in `last`."""
    load_package()
    from mambench.kernels.s6 import hopper_backward as H, hopper_backward_kernel
    divide, scratch = H.divide, H.scratch_elements
    if form == "scratch":
        H.divide = lambda **sizes: dataclasses.replace(divide(**sizes), in_place=False, parts=1)
    elif form == "one part":
        H.divide = lambda **sizes: dataclasses.replace(divide(**sizes), parts=1)
    elif form == "clocks":
        text = Path(hopper_backward_kernel.__file__).read_text()
        for planted, before in PLANTED:
            assert text.count(before) == 1, (text.count(before), before)
            text = text.replace(before, planted + before)
        path = OUT / "s6_exchange_clocks.py"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        H.scan_backward_kernel = module.scan_backward_kernel
        H.scratch_elements = lambda *a, **k: {n: size + (BLOCKS * CHUNKS * MARKS if n == "counters" else 0) for n, size in scratch(*a, **k).items()}
        call = H._Run.__call__
        H._Run.__call__ = lambda self, *a, **k: (setattr(H, "last", self), call(self, *a, **k))[1]
        H._calls = H.Calls(lambda recording, *a: (recording.refuse(), H._run(recording, *a))[1], H._ready)  # its scratch memory is read: no call is repeated
    return H


def part_check(found, number):
    import torch
    H = launcher("as it is")
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    B, D, L, G, N, dtype, z, skip, bias, softplus, last, segments = CHECKS[number]

    def one():
        t, dout, dlast = tensors(B, L, N, D, getattr(torch, dtype), G, z, skip, bias, softplus, seed=number)
        dl = dlast if last else None
        config = H.BackwardConfig()
        inputs, kept = prepared(t, config.chunk, bool(softplus))
        run = lambda k: H.scan_backward(inputs.original, inputs.softplus, k, dout, dl, config=config, segments=segments)
        got, more = run(kept), [run([kept.clone()])] + [run(kept) for _ in range(3)]
        want = reference(t, dout, dl, bool(softplus))
        errors = {k: relative(g, want[k]) for k, g in zip(NAMES, got) if g is not None}
        limit = dict(bfloat16=3e-3, float16=5e-4, float32=1e-5)[dtype]
        same = all(a is None or all(torch.equal(a, m[i]) for m in more) for i, a in enumerate(got))
        ok = same and all(e < (limit if k not in ("A", "D", "delta_bias") else 2e-5) for k, e in errors.items())
        found.add(case=number, what=CHECKS[number], ok=ok, same=same, errors=errors)

    found.guarded(f"check {number}", one)


def part_times(found, form, timed=True):
    """Time a form, or compile it; the cycles of each phase if it has clocks, medians over blocks and chunks but the first."""
    import torch
    H = launcher(form)
    for B, L in SHAPES:
        t, dout, _ = tensors(B, L, 16)
        config = H.BackwardConfig()
        inputs, kept = prepared(t, config.chunk)
        call = lambda: H.scan_backward(inputs.original, inputs.softplus, [kept], dout, None, config=config)
        if not timed:
            call(); torch.cuda.synchronize()
        elif form != "clocks":
            found.add(who=form, shape=[B, L], ms=graph_ms(call, 10, 3), kernels=kernels(call))
        elif L // 64 * B // 8 <= CHUNKS:
            call(); call(); torch.cuda.synchronize()
            marks = H.last.scratch["counters"].view(torch.int32)[-BLOCKS * CHUNKS * MARKS:].view(BLOCKS, CHUNKS, MARKS).cpu().long()[:, 1 : L // 64 * B // 8]
            cycles = ((marks[:, :, 1:7] - marks[:, :, :6]) % (1 << 32)).float().flatten(0, 1).median(0).values.tolist()
            found.add(who=form, shape=[B, L], cycles=dict(zip(PHASES, cycles)))


def main():
    if len(sys.argv) > 1:
        kind, what = sys.argv[1].split(":")
        found = Found(OUT / f"s6_exchange_{kind}_{what.replace(' ', '_')}.json")
        return part_check(found, int(what)) if kind == "check" else part_times(found, what, kind == "times")
    go = lambda kind, what: start(__file__, OUT, "s6_exchange", f"{kind}:{what}")
    made = {f"warm {f}": go("warm", f) for f in FORMS} | {f"check {i}": go("check", i) for i in range(len(CHECKS))}
    for label, process in made.items():
        finish(process, LIMIT - 20 - (time.time() - T0), label)
    for form in FORMS:
        finish(go("times", form), LIMIT - (time.time() - T0), form)
    rows = [row for path in sorted(OUT.glob("s6_exchange_*.json")) for row in json.loads(path.read_text())]
    for row in rows:
        print(json.dumps(row))
    checks = [row for row in rows if "ok" in row]
    print(f"gradients: {sum(row['ok'] for row in checks)} of {len(checks)} right, the same bits in {sum(row['same'] for row in checks)}; took {time.time() - T0:.0f} s")


if __name__ == "__main__":
    main()
