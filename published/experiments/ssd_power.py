"""Why does the Hopper SSD take longer a token at a million tokens? Strides of powers of two, or power.

    python3 published/experiments/ssd_power.py        # from the repository root; about 15 s; prints a line a length
"""
import os, sys, runpy, time
sys.argv = ["host.py", "none"]
src = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "host.py")).read().split("\nPARTS = ")[0]
exec(src)
import pynvml
pynvml.nvmlInit(); h = pynvml.nvmlDeviceGetHandleByUUID(("GPU-" if not str(torch.cuda.get_device_properties(0).uuid).startswith("GPU-") else "") + str(torch.cuda.get_device_properties(0).uuid))
def run(L, seconds):
    case = ssd_inputs(L)
    config = hopper_ssd.Config()
    call = lambda: hopper_ssd.ssd_forward(**case, keep=False, config=config)
    with torch.no_grad():
        call(); torch.cuda.synchronize()
        g = torch.cuda.CUDAGraph(); s = torch.cuda.Stream()
        with torch.cuda.graph(g): call()
        n0 = 3
        for _ in range(n0): g.replay()
        torch.cuda.synchronize()
        times, begin = [], time.time()
        while time.time() - begin < seconds:
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(); g.replay(); b.record(); b.synchronize(); times.append(a.elapsed_time(b) * 1e6 / L)
        clock = pynvml.nvmlDeviceGetClockInfo(h, pynvml.NVML_CLOCK_SM); reason = pynvml.nvmlDeviceGetCurrentClocksEventReasons(h); power = pynvml.nvmlDeviceGetPowerUsage(h) / 1e3
    k = max(1, len(times) // 10)
    print(f"L={L:9} {seconds:4.1f} s: first {statistics.median(times[:k]):.2f}, last {statistics.median(times[-k:]):.2f} ns/token; {clock} MHz, {power:.0f} W, reasons {reason:#x}, {len(times)} replays", flush=True)
    del case, g; torch.cuda.empty_cache()
for L, seconds in ((131072, 0.1), (131072, 1.5), (131000, .3), (524288, 0.2), (524288, 1.0), (500000, .5), (1 << 20, 0.2), (1 << 20, 1.0), (1000064, 1.0), (1_010_176, .5)):
    run(L, seconds)
