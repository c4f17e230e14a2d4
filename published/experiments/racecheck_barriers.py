"""What racecheck takes for a race between groups of warps, and what it misses: python3 racecheck_barriers.py.

Kernels in PTX of a few instructions, loaded by the driver: no compiler and no framework between. A first group of 128 threads
writes a word each to shared memory, a second one reads them; what lies between differs. Each runs 3 times 16 blocks under
`compute-sanitizer --tool racecheck`, twice. Results: $OUT/racecheck.json and a table; about 30 s on an H100's host.
"""
import ctypes, json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OUT = Path(os.environ.get("OUT", "/tmp/out"))
AT_ONCE = int(os.environ.get("AT_ONCE", "16"))
BLOCKS, LAUNCHES = 16, 3
BYTES = BLOCKS * LAUNCHES * 128 * 4  # that are written and read: a hazard each, if all of it is reported
ALL = "bar.sync 1;"  # of all 256 threads
WRITE, READ = "st.shared.b32 [%word], %thread;", "ld.shared.b32 %value, [%word];"
ADDRESS = "shl.b32 %n, %lane, 4; add.u32 %n, %n, %words;"
WRITE_MATRIX = ADDRESS + " stmatrix.sync.aligned.m8n8.x4.shared.b16 [%n], {%thread, %thread, %thread, %thread};"
READ_MATRIX = ADDRESS + " ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%value, %more0, %more1, %more2}, [%n];"
WAIT = "{ AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], 0; @!%done bra AGAIN; }"
ARRIVE, ARRIVE_ONE = (f"{who}mbarrier.arrive.shared::cta.b64 _, [%bar];" for who in ("", "@%one "))
LATER = "{ mov.u32 %n, 50; MORE: nanosleep.u32 1000; sub.u32 %n, %n, 1; setp.ne.u32 %done, %n, 0; @%done bra MORE; }"
KERNEL = """.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 out) .reqntid 256, 1, 1 {{
.reg .pred %done, %second, %one; .reg .b64 %place, %to;
.reg .b32 %thread, %lane, %word, %words, %bar, %value, %n, %more0, %more1, %more2;
.shared .align 128 .b8 memory[8192];
.shared .align 8 .b64 arrivals;
mov.u32 %words, memory; mov.u32 %bar, arrivals; mov.u32 %thread, %tid.x; mov.u32 %value, 0;
and.b32 %lane, %thread, 31; and.b32 %word, %thread, 127; setp.eq.u32 %one, %word, 0;
shl.b32 %word, %word, 2; add.u32 %word, %word, %words; setp.ge.u32 %second, %thread, 128;
@%second bra.uni SECOND;
{first}
bra.uni END;
SECOND:
{second}
END:
ld.param.u64 %to, [out]; cvta.to.global.u64 %to, %to; mul.wide.u32 %place, %thread, 4; add.u64 %to, %to, %place;
st.global.b32 [%to], %value;
ret;
}}
"""


def own(group, count):
    """`count` barriers of one group alone."""
    return f"bar.sync {2 + group}, 128;" * count


def made(count):
    return f"@%one mbarrier.init.shared::cta.b64 [%bar], {count}; " + ALL


def cases():
    """name: (whether it is in order, what the first group does, what the second does)."""
    found = {}
    for writers, readers in ((0, 0), (1, 0), (1, 1), (2, 1), (1, 2), (0, 2), (5, 5), (5, 6), (6, 5)):
        for late in ("", "writers late", "readers late"):
            first, second = (LATER if late.startswith(who) else "" for who in ("writers", "readers"))
            found[f"barrier of all between; own before: writers {writers}, readers {readers}{late and ', '}{late}"] = (
                True, first + own(0, writers) + WRITE + ALL, second + own(1, readers) + ALL + READ)
    for writers, readers in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 3), (2, 3)):
        found[f"no barrier of all; own before: writers {writers}, readers {readers}"] = (
            False, own(0, writers) + WRITE, LATER + own(1, readers) + READ)
    for name, count, arrive in (("every thread arrives", 128, ARRIVE), ("barrier of the writers, one arrives", 1, own(0, 1) + ARRIVE_ONE)):
        for writers, readers in ((0, 0), (2, 0), (0, 2)):
            found[f"mbarrier, {name}; own before: writers {writers}, readers {readers}"] = (
                True, made(count) + own(0, writers) + WRITE + arrive, ALL + own(1, readers) + WAIT + READ)
        found[f"mbarrier, {name}; not waited for"] = (False, made(count) + WRITE + arrive, ALL + LATER + READ)
        found[f"mbarrier back to the writers, {name.replace('writers', 'readers')}"] = (
            True, made(count) + WRITE + ALL + WAIT + WRITE, ALL + ALL + READ + arrive.replace("bar.sync 2", "bar.sync 3"))
    found["mbarrier, one arrives without a barrier"] = (False, made(1) + WRITE + ARRIVE_ONE, ALL + WAIT + READ)
    for name, write, read in (("stmatrix, ldmatrix", WRITE_MATRIX, READ_MATRIX), ("stmatrix, ld", WRITE_MATRIX, READ), ("st, ldmatrix", WRITE, READ_MATRIX)):
        found[f"no barrier of all; {name}"] = (False, write, LATER + read)
    return found


def launch(name):
    """Run one case in this process."""
    _, first, second = cases()[name]
    source = KERNEL.format(first=first, second=second)
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(function, *arguments):
        if code := getattr(cuda, function)(*arguments):
            sys.exit(f"{function}: CUDA error {code}")

    context, module, kernel, memory = (ctypes.c_void_p() for _ in range(4))
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    call("cuModuleLoadData", ctypes.byref(module), source.encode())
    call("cuModuleGetFunction", ctypes.byref(kernel), module, b"kernel")
    call("cuMemAlloc_v2", ctypes.byref(memory), 1024)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(memory))
    for _ in range(LAUNCHES):
        call("cuLaunchKernel", kernel, BLOCKS, 1, 1, 256, 1, 1, 0, None, arguments, None)
        call("cuCtxSynchronize")


def check(name):
    """Run a case under racecheck; returns the hazards that it counts, or what it said if it counts none."""
    command = ["compute-sanitizer", "--tool", "racecheck", "--racecheck-report", "hazard", "--print-limit", "1"]
    done = subprocess.run([*command, sys.executable, __file__, "--case", name], capture_output=True, text=True, timeout=60, check=False)
    summary = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warning", done.stdout)
    return int(summary[1]) + int(summary[2]) if summary and "CUDA error" not in done.stdout + done.stderr else done.stdout[-300:] + done.stderr[-300:]


def main():
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    OUT.mkdir(parents=True, exist_ok=True)
    names = list(cases())
    with ThreadPoolExecutor(AT_ONCE) as pool:
        counts = list(pool.map(check, names * 2))
    said = lambda command: subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()[-1]
    record = {
        "tool": said(["compute-sanitizer", "--version"]),
        "device": said(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]),
        "bytes": BYTES,
        "cases": [
            {"name": name, "in_order": cases()[name][0], "hazards": [counts[i], counts[i + len(names)]]} for i, name in enumerate(names)
        ],
    }
    (OUT / "racecheck.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record["tool"], "|", record["device"], "|", f"{BYTES} bytes written and read")
    for case in record["cases"]:
        verdict = "in order" if case["in_order"] else "race    "
        print(f"{verdict} {' '.join(f'{n!s:>6.60}' for n in case['hazards'])}  {case['name']}")


if __name__ == "__main__":
    launch(sys.argv[2]) if sys.argv[1:2] == ["--case"] else main()
