"""A stand-in for Nsight Compute and the program it profiles, with faults to choose from.

Run as `ncu` it understands the options that matter, runs itself as the program, and writes what ncu
writes. FAKE_NCU holds JSON: `faults` by item id ("raise", "crash", "hang", "unseen", "no_value"),
and any of `permission`, `silent`, `start`, `unit`, `lose` (a crash loses the table), `passes`; and,
where ranges are counted, `known` (the factor by which known bytes are off), `nameless` (results do
not name their range), `ranges` (an error: they are refused) and `again` (the program runs twice).
"""

import json
import os
import signal
import subprocess
import sys

HEADER = (
    '"ID","Process ID","Process Name","Host Name",'
    '"thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg",'
    '"Id:Domain:Start/Stop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg",'
    '"Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
    '"Section Name","Metric Name","Metric Unit","Metric Value"'
)
PERMISSION = (
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU "
    "Performance Counters on the target device 0. For instructions on enabling permissions and to "
    "get more information see https://developer.nvidia.com/ERR_NVGPUCTRPERM"
)
# Name, bytes read, bytes written, nanoseconds.
KERNELS = (("scan<16>(float *, int)", 3000, 1000, 2000), ("scan<16>(float *, int)", 500, 0, 1000))
DRAIN = ("reduce_kernel", 9_999_999, 250, 5000)
KNOWN_BYTES = 100_000


def main() -> int:
    chosen = json.loads(os.environ["FAKE_NCU"])
    if sys.argv[1] == "--child":
        return child(chosen, *sys.argv[2:])
    log = sys.argv[sys.argv.index("--log-file") + 1]
    if chosen.get("start"):
        print("==ERROR== Cuda driver is not compatible with Nsight Compute")
        return 1
    if chosen.get("silent"):
        return 0
    request, report = sys.argv[-2:]
    chosen["app_range"] = "app-range" in sys.argv
    if chosen["app_range"] and chosen.get("ranges"):
        with open(log, "w") as file:
            file.write("==ERROR== Range replay is not supported here\n")
        return 1
    for _ in range(2 if chosen["app_range"] and chosen.get("again") else 1):
        done = subprocess.run([sys.executable, __file__, "--child", request, report])
    lines = ["==PROF== Connected to process 4242 (/usr/bin/python3)"]
    if chosen.get("permission"):
        lines.append(PERMISSION)
    elif done.returncode == 0 or not chosen.get("lose"):
        lines += table(chosen, ended_well(report))
    if done.returncode:
        lines.append(f"==ERROR== The application returned an error code ({done.returncode}).")
    with open(log, "w") as file:
        file.write("\n".join(lines) + "\n")
    return 1 if done.returncode else 0


def child(chosen: dict, request: str, report: str) -> int:
    """Play `harness.counters.child` without a GPU."""
    with open(request) as file:
        items = json.load(file)["items"]
    with open(report, "a", buffering=1) as file:

        def tell(**values: object) -> None:
            file.write(json.dumps(values) + "\n")

        tell(event="start", pid=os.getpid())
        tell(event="ready", l2={"l2_bytes": 1000}, known_bytes=KNOWN_BYTES)
        for item in items:
            fault = chosen.get("faults", {}).get(item["id"])
            tell(event="begin", id=item["id"])
            tell(event="phase", id=item["id"], phase="count")
            if fault == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hang":
                signal.pause()
            if fault == "raise":
                tell(event="end", id=item["id"], outcome="error", reason="ValueError: planted")
                return 75
            for part in ("run", "drain"):
                tell(event="range", name=f"mambench-{item['id']}-{part}")
            tell(event="end", id=item["id"], outcome="ok")
    return 0


def ended_well(report: str) -> list[str]:
    with open(report) as file:
        messages = [json.loads(line) for line in file]
    ended = [m["id"] for m in messages if m["event"] == "end" and m["outcome"] == "ok"]
    return list(dict.fromkeys(ended))


def whole(chosen: dict, item: str, kernels: tuple) -> tuple:
    """Return the result of a range: all its kernels as one."""
    read, written, time_ns = (sum(kernel[place] for kernel in kernels) for place in (1, 2, 3))
    if item == "known" and kernels is KERNELS:
        read = written = round(KNOWN_BYTES * chosen.get("known", 1)) - DRAIN[2]
    return ("range", read, written, time_ns)


def table(chosen: dict, items: list[str]) -> list[str]:
    rows: list[str] = []
    lines: list[str] = []
    number = 0
    for item in items:
        fault = chosen.get("faults", {}).get(item)
        if fault == "unseen":
            continue
        for part, kernels in (("run", KERNELS), ("drain", (DRAIN,))):
            kernels = (whole(chosen, item, kernels),) if chosen["app_range"] else kernels
            for kernel in kernels:
                count = chosen.get("passes", 1)
                lines.append(
                    f'==PROF== Profiling "{kernel[0]}" - {number}: 0%....50%....100% - '
                    f"{count} pass{'es' if count > 1 else ''}"
                )
                rows += metric_rows(chosen, number, item, part, kernel, fault)
                number += 1
    return [*lines, "==PROF== Disconnected from process 4242", *([HEADER] if rows else []), *rows]


def metric_rows(
    chosen: dict, number: int, item: str, part: str, kernel: tuple, fault: str | None
) -> list[str]:
    name, read, written, time_ns = kernel
    unit = chosen.get("unit", "byte")
    scale = {"byte": 1, "Kbyte": 1000}.get(unit, 1)

    def amount(count: int) -> str:
        if fault == "no_value":
            return "n/a"
        return f"{count // scale:,}" if count % scale == 0 else f"{count / scale:,.6f}"

    named = f"0:<default domain>:mambench-{item}-{part}:none:none:none:none:none"
    named = "" if chosen.get("nameless") else named
    fixed = (
        f'"{number}","4242","python3.12","127.0.0.1","",'
        f'"{named}",'
        f'"{name}","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0","Command line profiler metrics",'
    )
    return [
        f'{fixed}"dram__bytes_read.sum","{unit}","{amount(read)}"',
        f'{fixed}"dram__bytes_write.sum","{unit}","{amount(written)}"',
        f'{fixed}"gpu__time_duration.sum","ns","{time_ns:,}"',
    ]


if __name__ == "__main__":
    sys.exit(main())
