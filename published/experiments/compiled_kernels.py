"""What every kernel compiles to, without a GPU: python3 compiled_kernels.py, from the repository's root.

Calls of every operation at pinned sizes (kernels/inventory.py) are executed up to their launches, and what they launch is
compiled for the architectures it is for: registers, spilled bytes, shared memory, instructions. Writes compiled-kernels.json
beside this file; some minutes of two cores, less where `check --static` has compiled the same before.
"""
import json, os, runpy, subprocess, sys, tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "mambench/_start.py"))["load_package"](ROOT / "mambench")
from mambench.harness import machine_cache

KEPT = ("entry", "architecture", "kernel", "number", "configuration", "registers", "stack_bytes", "shared_bytes", "instructions", "barriers", "error")


def said(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main():
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        subprocess.run([sys.executable, "-P", "mambench/_start.py", "harness.static.child", str(output), "--inventory", "kernels/inventory.py",
                        "--cache", str(machine_cache.folder() / "static")], cwd=ROOT, check=True)
        found = json.loads(output.read_text())
    rows = [{name: kernel[name] for name in KEPT if name in kernel} for kernel in found["kernels"]]
    named = os.environ.get("MAMBENCH_COMMIT")  # where there is no git
    head = {"made_at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": named or said("git", "rev-parse", "HEAD"),
            "changed": "" if named else said("git", "status", "--short", "--", "kernels"), "triton": found["triton"]}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n{lines}\n ]\n}}\n'
    Path(__file__).with_name("compiled-kernels.json").write_text(text)
    print(len(rows), "kernels;", [row for row in rows if "error" in row] or "all compile")


if __name__ == "__main__":
    main()
