"""The import rules of the design, checked on the source and, for torch, on a running process."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("harness", "implementations", "kernels", "reports")

# What a folder may import of the others; a longer prefix means only that module.
ALLOWED = {
    "kernels": ("kernels",),
    "implementations": ("implementations", "kernels", "harness.spec", "harness.errors"),
    "reports": (
        "reports",
        *("harness.spec", "harness.records", "harness.store", "harness.errors"),
        *("harness.analysis", "harness.curves", "harness.verdict", "harness.history"),
        *("harness.instruments.datasheets", "harness.reproduce", "harness.beside"),
    ),
    "harness": ("harness", "implementations", "kernels"),
}
# What harness may import at module level; the rest of implementations is loaded by name, lazily.
HARNESS_EAGER = (
    *("harness", "implementations.base", "implementations.cost"),
    "implementations.exponentials",
)
# These run in the worker only, which exists to import torch.
WORKER_SIDE = (
    "harness.worker",
    "harness.gate",
    "harness.gate_candidate",
    "harness.gate_errors",
    "harness.instruments.memory",
)
# Their module-level imports, followed through all of ours, reach neither torch nor triton.
TORCH_FREE = (
    *("harness.spec", "harness.records", "harness.errors", "harness.plan", "harness.suite"),
    *("harness.registry", "harness.machine", "harness.store", "harness.analysis.loading"),
    *("harness.runner", "harness.batches", "harness.ledger", "harness.failures"),
    *("harness.doctor", "harness.progress", "harness.cli.views"),
    *("harness.cli.options", "harness.cli.begin", "harness.reproduce"),
    *("harness.cli.check", "harness.check.commands", "harness.check.report", "harness.verdict"),
    *("harness.check.side_plan", "harness.check.simulate"),
    *("harness.instruments.ceilings", "harness.counters.count", "harness.counters.ncu"),
    "harness.environment",
    *("harness.selftest.run", "harness.selftest.statistics", "harness.selftest.cpu"),
    *("harness.machine_cache", "harness.selftest.energy", "harness.selftest.cache"),
    *("implementations.base", "implementations.cost", "run_bench"),
)
TORCH_FREE_PATTERNS = ("reports/*.py", "implementations/ops/*.py", "kernels/**/cost.py")
HEAVY = ("torch", "triton", "numba")


@dataclass(frozen=True)
class Import:
    """One imported module: where, and whether it is imported when the file is."""

    target: str  # dotted, without `mambench.` for ours
    ours: bool
    line: int
    eager: bool  # at module level and not under TYPE_CHECKING
    typing: bool


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((root / folder).rglob("*.py"))
    yield from (path for path in [root / "run_bench.py"] if path.is_file())


def imports(root: Path, path: Path) -> list[Import]:
    found: list[Import] = []

    def add(node: ast.stmt, name: str, eager: bool, typing: bool) -> None:
        ours = name == "mambench" or name.startswith("mambench.")
        target = name.removeprefix("mambench").removeprefix(".")
        found.append(Import(target, ours, node.lineno, eager and not typing, typing))

    def visit(node: ast.AST, eager: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(node, alias.name, eager, typing)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(root, path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join(["mambench", *package, *([base] if base else [])])
            for alias in node.names:
                add(node, resolved(root, base, alias.name), eager, typing)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, eager, True)
            for child in node.orelse:
                visit(child, eager, typing)
        else:
            inner = eager and not isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            for child in ast.iter_child_nodes(node):
                visit(child, inner, typing)

    visit(ast.parse(path.read_text()), True, False)
    return found


def resolved(root: Path, base: str, name: str) -> str:
    """Return `base.name` if that is a module of ours, and else `base`, which holds the name."""
    if base.split(".")[0] != "mambench":
        return base
    inside = root.joinpath(*base.split(".")[1:], name)
    is_module = inside.with_suffix(".py").is_file() or inside.is_dir()
    return f"{base}.{name}" if is_module else base


def within(target: str, allowed: tuple[str, ...]) -> bool:
    return any(target == prefix or target.startswith(prefix + ".") for prefix in allowed)


def violations(root: Path) -> list[str]:
    """Return every breach of the import rules in a tree, each as one line."""
    graph = {module_name(root, path): (path, imports(root, path)) for path in sources(root)}
    found: list[str] = []
    for module, (path, used) in graph.items():
        found += edge_violations(module, path.relative_to(root), used)
        found += import_time_violations(module, path)
    patterns = [module_name(root, p) for pattern in TORCH_FREE_PATTERNS for p in root.glob(pattern)]
    for module in dict.fromkeys([*TORCH_FREE, *patterns]):
        if module in graph:
            found += heavy_violations(module, graph)
    return found


def edge_violations(module: str, path: Path, used: list[Import]) -> list[str]:
    folder = module.split(".")[0]
    found: list[str] = []
    for item in used:
        where = f"{path}:{item.line}"
        if not item.ours:
            if item.target.split(".")[0] in FOLDERS:
                found.append(f"{where}: bare import of {item.target}; write mambench.{item.target}")
        elif not item.target or folder == "run_bench":
            continue  # mambench itself holds only the version
        elif not within(item.target, ALLOWED[folder]):
            found.append(f"{where}: {folder} may not import {item.target}")
        elif (
            folder == "harness"
            and item.eager
            and module not in WORKER_SIDE
            and not within(item.target, HARNESS_EAGER)
        ):
            found.append(f"{where}: {module} must import {item.target} lazily")
    return found


def heavy_violations(module: str, graph: dict[str, tuple[Path, list[Import]]]) -> list[str]:
    """Follow module-level imports and return each way to torch, triton or numba."""
    found: list[str] = []
    seen: set[str] = set()
    waiting = [(module, module)]
    while waiting:
        name, way = waiting.pop()
        if name in seen or name not in graph:
            continue
        seen.add(name)
        for item in graph[name][1]:
            if not item.eager:
                continue
            if not item.ours and item.target.split(".")[0] in HEAVY:
                found.append(f"{way} imports {item.target} at module level")
            elif item.ours:
                # Importing a.b.c imports a and a.b too.
                parts = item.target.split(".")
                for end in range(1, len(parts) + 1):
                    step = ".".join(parts[:end])
                    waiting.append((step, f"{way} -> {step}"))
    return found


def import_time_violations(module: str, path: Path) -> list[str]:
    """Return statements that act when a module is imported: calls for their effect, environment."""
    if module == "run_bench":
        return []
    found: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        # Kernels may register types and lowerings with their compiler, as a decorator would.
        acts = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if acts and not module.startswith("kernels."):
            found.append(f"{module}:{node.lineno}: acts at import: {ast.unparse(node)}")
        elif "os.environ" in ast.unparse(node) or "os.getenv" in ast.unparse(node):
            found.append(f"{module}:{node.lineno}: reads the environment at import")
    return found


def test_the_tree_keeps_the_rules():
    assert violations(ROOT) == []


def test_the_wheel_has_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(("mambench", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found <= set(settings["packages"])


def test_the_checker_sees_the_whole_tree():
    modules = {module_name(ROOT, path) for path in sources(ROOT)}
    assert {"run_bench", "harness.plan", "implementations.base", "reports"} <= modules
    eager = {item.target for item in imports(ROOT, ROOT / "harness/plan.py") if item.eager}
    assert {"harness.spec", "harness.registry", "harness.estimate"} <= eager


FAULTS = {
    "kernels import harness": ("kernels/k.py", "from mambench.harness.spec import Case\n"),
    "implementations import the runner": (
        "implementations/i.py",
        "def f():\n    from mambench.harness import runner\n",
    ),
    "reports import the plan": ("reports/r.py", "import mambench.harness.plan\n"),
    "reports import implementations": (
        "reports/r.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from mambench.implementations.base import Variant\n",
    ),
    "harness imports reports": ("harness/h.py", "from mambench import reports\n"),
    "harness imports an operation eagerly": (
        "harness/h.py",
        "from mambench.implementations.ops import ssd\n",
    ),
    "a bare import": ("harness/h.py", "from kernels import s6\n"),
    "a relative import upwards": ("kernels/s6/k.py", "from ...harness import spec\n"),
    "torch in the vocabulary": ("harness/spec.py", "import torch\n"),
    "triton behind a try": (
        "harness/machine.py",
        "try:\n    import triton.language\nexcept ImportError:\n    pass\n",
    ),
    "torch in a class body": ("implementations/ops/ssd.py", "class A:\n    import torch\n"),
    "torch in a cost model": ("kernels/s6/cost.py", "from torch import nn\n"),
    "numba in a report": ("reports/page.py", "import numba\n"),
    "seeding at import": ("harness/h.py", "import random\nrandom.seed(0)\n"),
    "environment at import": ("harness/h.py", "import os\nA = os.environ.get('A')\n"),
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for folder in ("harness", "implementations/ops", "kernels/s6", "reports"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "__init__.py").touch()
    for name in ("harness/runner.py", "harness/spec.py", "implementations/ops/ssd.py"):
        (root / name).touch()
    for name, text in files.items():
        (root / name).write_text(text)
    return root


def test_a_sound_tree_has_no_violation(tmp_path: Path):
    sound = {
        "harness/h.py": (
            "from typing import TYPE_CHECKING\n"
            "from mambench.harness.spec import Case\n"
            "if TYPE_CHECKING:\n    from torch import Tensor\n"
            "def f():\n    import torch\n    from mambench.implementations.ops import ssd\n"
        ),
        "kernels/s6/k.py": "import torch\nfrom mambench.kernels.s6 import other\n",
        "run_bench.py": "from mambench.harness import spec\nimport sys\nsys.path.pop()\n",
    }
    assert violations(plant(tmp_path, sound)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str):
    name, text = FAULTS[fault]
    found = violations(plant(tmp_path, {name: text}))
    assert len(found) == 1, found


def test_torch_is_found_through_two_modules(tmp_path: Path):
    files = {
        "harness/plan.py": "from mambench.harness import deep\n",
        "harness/deep.py": "from mambench.harness.deeper import x\n",
        "harness/deeper.py": "import torch\nx = 1\n",
    }
    found = violations(plant(tmp_path, files))
    way = "harness.plan -> harness.deep -> harness.deeper"
    assert found == [f"{way} imports torch at module level"]


COMMANDS = {
    "help": ["--help"],
    "list": ["list"],
    "plan": ["plan", "--device", "cpu"],
    "doctor": ["doctor"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_leaves_torch_alone(command: str):
    code = (
        "import atexit, json, runpy, sys\n"
        f"sys.argv = ['run_bench.py', *{COMMANDS[command]!r}]\n"
        "@atexit.register\n"
        "def tell():\n"
        "    heavy = sorted({'torch', 'triton', 'numba', 'numpy', 'pandas'} & set(sys.modules))\n"
        "    print('\\n' + json.dumps([heavy, sys.path]))\n"
        f"runpy.run_path({str(ROOT / 'run_bench.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    heavy, path = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    # Otherwise `import kernels` of a library would find our folder.
    assert not {str(ROOT), ""} & set(path)
