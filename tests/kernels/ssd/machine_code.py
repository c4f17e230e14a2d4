"""What can be wrong on some way through machine code, followed from instruction to instruction.

ptxas of Triton 3.6 can let a product on one side of a branch take its tile's descriptor from
registers that only the other side sets. Each register of a descriptor is set once on all ways to
its product; where several definitions reach it, or none, it is somebody else's value.

A role of a programmatic launch can forget to wait for the launch before, and a stage can be given
back while some warp's product still reads it.
"""

import re
from collections import Counter

_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_PAIRS = (".64", ".WIDE")
_WAIT = "ACQBULK"  # for the launch before
_GLOBAL = ("LDG", "STG", "ATOMG", "REDG", "UTMALDG", "UTMASTG", "UTMAREDG")


def mixed_descriptors(sass):
    """Return the products whose descriptors' registers have no definition or several."""
    code = _instructions(sass)
    follow = _followers(code)
    reaching, of_register = _reaching([_defined(text) for _, text in code], follow)
    found = []
    for i, (_, text) in enumerate(code):
        used = re.search(r"HGMMA\S* R\d+, R\d+, gdesc\[UR(\d+)\]", text)
        if used and i in reaching:
            pair = (f"UR{int(used[1]) + k}" for k in (2, 3))  # of the right operand
            found += [text for r in pair if (reaching[i] & of_register[r]).bit_count() != 1]
    return found


def unawaited(sass):
    """Return what touches global memory on some way on which the launch before is not awaited."""
    code = _instructions(sass)
    follow, seen, waiting = _followers(code), {0}, [0]
    while waiting:
        i = waiting.pop()
        if not code[i][1].startswith(_WAIT):
            waiting += (after := set(follow[i]) - seen)
            seen |= after
    names = [re.sub(r"^@!?U?P\w+\s+", "", code[i][1]) for i in sorted(seen)]
    return [text for text in names if text.startswith(_GLOBAL)]


def hurried(sass):
    """Return the arrivals at which, on some way, a product may not be over in all warps."""
    code = _instructions(sass)
    follow, found = _followers(code), set()
    under_way, over_here, over = range(3)
    reached, waiting = {(0, over)}, [(0, over)]
    while waiting:
        i, products = waiting.pop()
        name = code[i][1]
        if "SYNCS.ARRIVE" in name and products != over:
            found.add(i)
        if "HGMMA" in name:
            products = under_way
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in name and products == under_way:
            products = over_here
        elif "BAR.SYNC" in name and products == over_here:
            products = over
        after = {(j, products) for j in follow[i]} - reached
        reached |= after
        waiting += after
    return [code[i][1] for i in sorted(found)]


def _instructions(sass):
    """Return the address and the text of each."""
    return [(int(m[1], 16), m[2].strip()) for m in map(_LINE.search, sass.splitlines()) if m]


def _defined(text):
    """Return the uniform registers that an instruction sets, and whether it always does."""
    always = not text.startswith("@")
    name, *rest = text.split(None, 2 if always else 3)[0 if always else 1 :]
    arguments = [a.strip() for a in " ".join(rest).split(",")]
    if arguments and re.fullmatch(r"U?P\w+", arguments[0]):
        arguments = arguments[1:]
    if name.startswith(("ST", "UTMA", "SYNCS", "RED", "BRA", "HGMMA")) or not arguments:
        return (), always
    first = re.fullmatch(r"UR(\d+)", arguments[0])
    if not first:
        return (), always
    count = 2 if any(part in name for part in _PAIRS) else 1
    return tuple(f"UR{int(first[1]) + k}" for k in range(count)), always


def _followers(code):
    """Return which instructions may come after each; partitions begin at the indirect branch."""
    index = {address: i for i, (address, _) in enumerate(code)}
    jumps = Counter(text for _, text in code if text.startswith("BRA 0x"))
    again = jumps.most_common(1)[0][0]  # to the wait for the next partition's start
    follow = []
    for i, (_, text) in enumerate(code):
        target = re.search(r"BRA 0x([0-9a-f]+)", text)
        after = [] if text.startswith(("BRA", "EXIT", "BRX")) else [i + 1]
        if target and int(target[1], 16) in index:
            after.append(index[int(target[1], 16)])
        if text.startswith("BRX"):
            after = [i + 1, *(j + 1 for j, (_, other) in enumerate(code) if other == again)]
        follow.append([j for j in after if j < len(code)])
    return follow


def _reaching(defined, follow):
    """Return the bits of the definitions that reach each instruction, and all of each register."""
    makes, of_register = [0] * len(defined), Counter()
    for number, (i, r) in enumerate((i, r) for i, (rs, _) in enumerate(defined) for r in rs):
        makes[i] |= 1 << number
        of_register[r] |= 1 << number
    ends = [0] * len(defined)
    for i, (registers, always) in enumerate(defined):
        for r in registers if always else ():
            ends[i] |= of_register[r]
    reaching, waiting = {0: 0}, [0]
    while waiting:
        i = waiting.pop()
        out = (reaching[i] & ~ends[i]) | makes[i]
        for j in follow[i]:
            known = reaching.get(j)
            if known is None or out | known != known:
                reaching[j] = out | (known or 0)
                waiting.append(j)
    return reaching, of_register
