"""What kernels compile to, as a Markdown table: the record of `compiled_kernels.py`.

A row is a kernel of an operation, a column an architecture; a cell holds the most that any of its
forms takes (sizes, options, dtypes). Imports no torch.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambench.harness.errors import RunFolderError
from mambench.reports.markdown import escape

_SIZES = re.compile(r" (?:bf16|fp16|fp32)\b.*")  # of an entry's name: dtype and sizes
_NONE = "\u2013"  # as in the other tables


def table(path: Path) -> str:
    """Return a record's table; raises RunFolderError where the file is none."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return _table(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path}: not a record of compiled kernels: {error!r}") from error


def _table(record: Mapping[str, Any]) -> str:
    forms: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for kernel in record["kernels"]:
        forms[_SIZES.sub("", kernel["entry"]), kernel["kernel"]].append(kernel)
    architectures = sorted({kernel["architecture"] for kernel in record["kernels"]})
    lines = [
        f"{record['made_at'][:10]}, code {record['commit'][:8]}, Triton "
        f"{escape(record['triton'])}. Registers a thread, bytes a thread spilled, KiB of shared "
        f"memory a block; of several forms the most.",
        "",
        "| operation | kernel | forms | " + " | ".join(f"sm_{a}" for a in architectures) + " |",
        "|---|---|---:|" + "---:|" * len(architectures),
    ]
    for (operation, name), found in sorted(forms.items()):
        by_place = [[k for k in found if k["architecture"] == a] for a in architectures]
        cells = [str(max(map(len, by_place))), *map(_cell, by_place)]
        lines.append(f"| {escape(operation)} | `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return _NONE
    if any("error" in kernel for kernel in found):
        return "does not compile"
    registers, stack, shared = (
        max(kernel[key] for kernel in found) for key in ("registers", "stack_bytes", "shared_bytes")
    )
    return f"{registers}, {stack}, {shared / 1024:.3g}"
