"""What the compilers say of CUDA kernels: ptxas its registers and spills, the PTX everything else.

The build keeps both beside its objects (setup.py). Nothing here runs a kernel; the checks are functions that return
what is wrong with one, so that a test can also show that they object to a bad one.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
MIXES = ("f32", "f64", "bf16", "f16", "bf16_f32", "f16_f32", "any_f32", "any_f64")
BYTES = {"f32": (4, 4), "f64": (8, 8), "bf16": (2, 2), "f16": (2, 2), "bf16_f32": (2, 4), "f16_f32": (2, 4)}
"""Of an element of parameter and gradient, and of a state."""
ACCESS = 16
THREADS = 128
"""Of a block."""
REGISTERS = 65536
"""Of a multiprocessor, on every architecture since 2014; a warp's are handed out 256 at a time, 8 a thread."""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: of which chain and mix, what ptxas gave it, and its PTX, one instruction a line."""

    entry: str
    arch: str
    chain: str
    mix: str
    centralised: bool
    scaled: bool
    tier: int
    registers: int
    stack: int
    spills: int
    parameter_bytes: int
    ptx: tuple[str, ...]

    def __str__(self) -> str:
        how = ", centralised" * self.centralised + ", scaled" * self.scaled
        return f"{self.chain}{how} ({self.mix}, tier {self.tier}, {self.arch})"

    @property
    def dense(self) -> bool:
        return not self.mix.startswith("any_")

    @property
    def threads(self) -> int:
        """That a multiprocessor can hold at once."""
        blocks = REGISTERS // (THREADS * -(-self.registers // 8) * 8)
        return THREADS * min(blocks, 2048 // THREADS)

    @property
    def elements(self) -> int:
        """That a thread takes at once: 16 bytes of the widest stream."""
        return ACCESS // max(BYTES[self.mix])

    def accesses(self, slots: int) -> tuple[Counter[int], Counter[int]]:
        """Loads and stores of one round of the loop, how many of how many bytes: one of every stream, and with a loss
        scale the gradient is stored too."""
        of_parameter, of_state = (size * self.elements for size in BYTES[self.mix])
        loads = Counter({of_parameter: 2}) + Counter({of_state: slots})
        return loads, loads - Counter({of_parameter: 0 if self.scaled else 1})

    def in_flight(self, slots: int) -> float:
        """KB of loads that a multiprocessor has under way when every thread waits for its round."""
        return self.threads * sum(size * n for size, n in self.accesses(slots)[0].items()) / 1024


def _chain(entry: str) -> tuple[str, str, bool, bool, int] | None:
    """From a mangled name fastopt::update<Chain<stages...>, mix, centralised, scaled, tier>; None: another kernel's."""
    found = re.search(r"updateINS\w*?_5ChainIJ(.*?E)EEELNS_3MixE(\d)ELb([01])ELb([01])ELi(\d)E", entry)
    if not found:
        return None
    stages, rest = [], found[1]
    while head := re.match(r"NS_(\d+)", rest):
        end = head.end() + int(head[1])
        stages.append(rest[head.end() : end])
        rest = rest[end + 1 :]  # the E that closes it
    return "+".join(stages), MIXES[int(found[2])], found[3] == "1", found[4] == "1", int(found[5])


_RESOURCES = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'\n"
    r".*\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"ptxas info\s+: Used (\d+) registers"
)


def bodies(ptx: str) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Entry, bytes of parameters and instructions of every kernel in a PTX file."""
    for found in re.finditer(r"^(?:\.visible )?\.entry (\w+)\((.*?)^\)(.*?)^\}", ptx, re.MULTILINE | re.DOTALL):
        sizes = (int(n) for n in re.findall(r"\[(\d+)\]", found[2]))
        lines = (re.sub(r"//.*", "", line).strip() for line in found[3].splitlines())
        yield found[1], sum(sizes), tuple(line for line in lines if line and not line.startswith(".") and line != "{")


def kernels_of(log: str, ptx: list[str]) -> Iterator[Kernel]:
    """The kernels of one compilation, from ptxas's report and the PTX of each architecture."""
    found = {}
    for text in ptx:
        target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
        assert target, "no .target in the PTX"
        found |= {(entry, target[1]): (size, lines) for entry, size, lines in bodies(text)}
    for entry, arch, stack, stores, loads, registers in _RESOURCES.findall(log):
        if name := _chain(entry):
            size, lines = found[entry, arch]
            yield Kernel(entry, arch, *name, int(registers), int(stack), int(stores) + int(loads), size, lines)


def loops(ptx: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The innermost loops: from a label to the last branch back to it."""
    labels = {line[:-1]: at for at, line in enumerate(ptx) if line.endswith(":")}
    ends: dict[int, int] = {}
    for at, line in enumerate(ptx):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\S+);", line)
        if jump and labels[jump[1]] < at:
            ends[labels[jump[1]]] = at
    inner = [(a, b) for a, b in ends.items() if not any(a < c and d < b for c, d in ends.items())]
    return [ptx[a : b + 1] for a, b in sorted(inner)]


_MEMORY = re.compile(r"\b(ld|st|atom|red)\.(?!param|const)([\w.:]*).*?\[(%\w+)")


def wrong_accesses(kernel: Kernel, slots: int) -> list[str]:
    """What is repeated must move a vector of every stream an access: 16 bytes of the widest. Outside the loops
    everything runs once a work item, so no table is worth a wider access; and one loop, which stores no vector, takes
    what is less than a vector at the end of a tensor (that it takes no more than that, running the code tells).

    The one exception is a value at an address that no instruction of the loop computes (the gradient scale): it is no
    stream.
    """
    wrong, hot, ends = [], 0, 0
    expected = kernel.accesses(slots)
    for loop in loops(kernel.ptx):
        found = {"ld": Counter[int](), "st": Counter[int]()}
        narrow = []
        written = {name for line in loop for name in re.findall(r"^(?:@!?%\w+ )?(?!st)\S+\s+(%\w+)", line)}
        # A generic address is turned into a global one, which changes nothing.
        same = dict(re.findall(r"cvta\.to\.global\.u64\s+(%\w+), (%\w+)", "\n".join(loop)))
        for line in loop:
            if access := _MEMORY.search(line):
                kind, how, address = access.groups()
                if vector := re.search(r"v([24])\.[fbu](32|64)", how):
                    found[kind][int(vector[1]) * int(vector[2]) // 8] += 1
                elif kind != "ld" or same.get(address, address) in written:
                    narrow.append(f"a loop accesses less than a vector at a time: {line}")
        if found["st"]:
            hot += 1
            wrong += narrow
            if (found["ld"], found["st"]) != expected:
                wrong.append(f"a loop loads and stores vectors of {found}, not {expected}")
        elif any("st." in line for line in narrow):
            ends += 1
        else:
            wrong += narrow
    if not hot:
        wrong.append("no loop stores vectors")
    if ends > hot:
        wrong.append(f"{ends} loops take less than a vector at a time, beside {hot} that take vectors")
    return wrong


def wrong_arithmetic(kernel: Kernel) -> list[str]:
    """Every operation must be IEEE's, and none may be contracted. (Multiply-adds cannot be counted: nvcc may keep both
    arms of a branch, or copy what follows one. Whether they are those that the stages write, running the code tells.)
    """
    wrong = [
        f"not IEEE arithmetic: {line}"
        for line in kernel.ptx
        if re.search(r"\b(?:sqrt|div|rcp|rsqrt|sin|cos|ex2|lg2|tanh)\.(?!rn\.)\w*|\.ftz|\bmad\.(?:rn\.)?f", line)
        and not re.search(r"\bdiv\.[su]\d", line)
    ]
    # With contraction allowed these are written without .rn, and it is ptxas that contracts them.
    wrong += [
        f"may be contracted: {line}"
        for line in kernel.ptx
        if re.search(r"\b(?:add|sub|mul)\.(?!rn\.)\w*f(?:32|64)", line)
    ]
    return wrong


def wrong_resources(kernel: Kernel, most_registers: int) -> list[str]:
    wrong = []
    if kernel.stack or kernel.spills:
        wrong.append(f"{kernel.stack} bytes of stack, {kernel.spills} spilled")
    if kernel.registers > most_registers:
        wrong.append(f"{kernel.registers} registers, the budget is {most_registers}")
    return wrong


@cache
def build_script() -> ModuleType | None:
    """setup.py as a module: it knows the folder, the flags and the toolkit. None without sources."""
    if not (ROOT / "setup.py").exists():
        return None
    spec = importlib.util.spec_from_file_location("fastopt_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
