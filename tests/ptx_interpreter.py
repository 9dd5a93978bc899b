"""Runs a kernel's PTX on the CPU, lane by lane: what nvcc made of the source, on machines without a GPU.

Each basic block becomes a Python function over a dictionary of registers; a lane that meets a shuffle waits for the
other lanes of its warp. Memory is the process's own, but only the ranges that a test declares may be touched, at
addresses that are multiples of the access: out-of-bounds and misaligned accesses raise. Arithmetic is IEEE's with one
rounding for each operation; the payload of a NaN is not kept.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

LANES = 32
SIZES = {"f16": 2, "bf16": 2, "pred": 1} | {f"{kind}{bits}": bits // 8 for kind in "usbf" for bits in (8, 16, 32, 64)}

Registers = dict[str, Any]
Block = Callable[[Registers, Any], "int | None"]


def f32(x: float) -> float:
    return ctypes.c_float(x).value


def divide(a: float, b: float) -> float:
    if b == 0 or b != b:
        return math.nan if a == 0 or a != a or b != b else math.copysign(math.inf, a) * math.copysign(1, b)
    return a / b


def root(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def fma64(a: float, b: float, c: float) -> float:
    if not all(map(math.isfinite, (a, b, c))) or not (a and b and c):
        return a * b + c  # a product with a zero is exact, a sum with a zero too unless the product rounds
    return _nearest(Fraction(a) * Fraction(b) + Fraction(c), a * b + c)


def _nearest(exact: Fraction, about: float) -> float:
    if not exact:
        return about
    try:
        return exact.numerator / exact.denominator  # division of integers rounds once, to nearest even
    except OverflowError:
        return math.copysign(math.inf, exact)


def fma32(a: float, b: float, c: float) -> float:
    product = a * b  # exact: 48 bits
    total = product + c
    if not math.isfinite(total):
        return f32(total)
    high = total - product
    error = (product - (total - high)) + (c - high)
    if error and struct.unpack("<q", struct.pack("<d", total))[0] & 1 == 0:
        total = math.nextafter(total, math.copysign(math.inf, error))  # rounded to odd, so that f32 rounds but once
    return f32(total)


def to_bf16(x: float) -> int:
    if x != x:
        return 0x7FFF
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16) & 0xFFFF


def to_f16(x: float) -> int:
    if x != x:
        return 0x7FFF
    try:
        return int(struct.unpack("<H", struct.pack("<e", x))[0])
    except OverflowError:
        return 0xFC00 if x < 0 else 0x7C00


def from_f16(bits: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def quotient(a: int, b: int) -> int:
    """Towards zero, as the device divides."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_CODES = {4: "<f", 8: "<d"}


def bits_of(x: float, size: int) -> int:
    return int.from_bytes(struct.pack(_CODES[size], x), "little")


def float_of(bits: int, size: int) -> float:
    return float(struct.unpack(_CODES[size], bits.to_bytes(size, "little"))[0])


class Memory:
    """Ranges of the process's memory that a kernel may touch."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, str]] = []
        self.stores: Counter[tuple[str, int]] = Counter()
        """How many there were, by what was written to and how many bytes at once."""

    def allow(self, address: int, size: int, name: str) -> None:
        if size:
            self._ranges = sorted([*self._ranges, (address, address + size, name)])

    def _check(self, address: int, size: int) -> str:
        at = bisect_right(self._ranges, (address, 1 << 65, "")) - 1
        if at < 0 or address + size > self._ranges[at][1]:
            raise MemoryError(f"{size} bytes at {address:#x} belong to nothing the kernel was given")
        if address % size:
            raise MemoryError(f"{size} bytes at {address:#x}: misaligned, in {self._ranges[at][2]}")
        return self._ranges[at][2]

    def load(self, address: int, size: int, count: int) -> list[int]:
        self._check(address, size * count)
        data = ctypes.string_at(address, size * count)
        return [int.from_bytes(data[k : k + size], "little") for k in range(0, size * count, size)]

    def prefetch(self, address: int) -> None:
        self._check(address, 1)

    def store(self, address: int, size: int, values: list[int]) -> None:
        self.stores[self._check(address, size * len(values)), size * len(values)] += 1
        ctypes.memmove(address, b"".join(value.to_bytes(size, "little") for value in values), size * len(values))


def _width(register: str) -> int:
    """Bytes of a register, by its name."""
    prefixes = {"%fd": 8, "%f": 4, "%rd": 8, "%rs": 2, "%r": 4, "%p": 1, "%h": 2}
    return next(size for prefix, size in prefixes.items() if re.fullmatch(rf"{prefix}\d+", register))


def _is_float(register: str) -> bool:
    return bool(re.fullmatch(r"%fd?\d+", register))


class _Translator:
    """From one PTX instruction to a line of Python. Integers are kept unsigned, floats as Python's."""

    def __init__(self, parameters: str) -> None:
        self.parameters = parameters

    def value(self, text: str, kind: str = "") -> str:
        """An operand as an instruction of type `kind` reads it."""
        text = text.strip()
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
            digits = found[1] or found[2]
            number = float_of(int(digits, 16), len(digits) // 2)
            return repr(number) if math.isfinite(number) else f"float('{number}')"
        if re.fullmatch(r"-?\d+", text):
            if kind[:1] in ("u", "s", "b"):
                bits = 8 * SIZES[kind]
                number = int(text) % (1 << bits)
                return str(signed(number, bits) if kind[0] == "s" else number)
            return text
        if text in ("%tid.x", "%ctaid.x"):
            return f"r['{text}']"
        if text == self.parameters:
            return "r['parameters']"
        assert text.startswith("%"), text
        read = f"r['{text}']"
        if kind[:1] == "s" and not _is_float(text):
            bits = 8 * min(SIZES[kind], _width(text))
            return f"signed({read} & {(1 << bits) - 1}, {bits})"
        if kind[:1] in ("u", "b") and not _is_float(text) and kind and SIZES[kind] < _width(text):
            return f"({read} & {(1 << 8 * SIZES[kind]) - 1})"
        return read

    def bits(self, text: str) -> str:
        """An operand as its bits."""
        if found := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", text):
            return str(int(found[1], 16))
        value = self.value(text)
        return f"bits_of({value}, {_width(text)})" if _is_float(text.strip()) else value

    def to(self, register: str, expression: str, from_bits: bool = False) -> str:
        register = register.strip()
        if _is_float(register):
            return f"r['{register}'] = " + (f"float_of({expression}, {_width(register)})" if from_bits else expression)
        if register.startswith("%p"):
            return f"r['{register}'] = {expression}"
        return f"r['{register}'] = ({expression}) & {(1 << 8 * _width(register)) - 1}"

    def address(self, text: str) -> str:
        found = re.fullmatch(r"\[([%\w.$]+)(?:\+(-?\d+))?\]", text.strip())
        assert found, text
        return f"{self.value(found[1])} + {found[2] or 0}"

    def __call__(self, operation: str, operands: list[str]) -> list[str]:
        name, *how = operation.split(".")
        method = getattr(self, "op_" + name, None)
        if method is None:
            raise NotImplementedError(f"{operation} {', '.join(operands)}")
        lines = method(how, *operands)
        return [lines] if isinstance(lines, str) else list(lines)

    def op_mov(self, how: list[str], to: str, source: str) -> Iterator[str]:
        if to.startswith("{"):
            parts = [part.strip() for part in to.strip("{} ").split(",")]
            yield f"x = {self.bits(source)}"
            for k, part in enumerate(parts):
                yield self.to(part, f"x >> {8 * _width(part) * k}", from_bits=True)
        elif source.startswith("{"):
            parts = [part.strip() for part in source.strip("{} ").split(",")]
            shifted = (f"({self.bits(part)} << {8 * _width(part) * k})" for k, part in enumerate(parts))
            yield self.to(to, " | ".join(shifted), from_bits=True)
        elif source.startswith("%") and source not in ("%tid.x", "%ctaid.x") and _is_float(to) != _is_float(source):
            yield self.to(to, self.bits(source), from_bits=True)
        else:
            yield self.to(to, self.value(source))

    def op_cvta(self, how: list[str], to: str, source: str) -> str:
        return self.to(to, self.value(source))

    def op_ld(self, how: list[str], to: str, address: str) -> Iterator[str]:
        kind, size = how[-1], SIZES[how[-1]]
        registers = [part.strip() for part in to.strip("{} ").split(",")]
        yield f"x = m.load({self.address(address)}, {size}, {len(registers)})"
        for k, register in enumerate(registers):
            value = f"signed(x[{k}], {8 * size})" if kind[0] == "s" else f"x[{k}]"
            yield self.to(register, value, from_bits=True)

    def op_prefetch(self, how: list[str], address: str) -> str:
        return f"m.prefetch({self.address(address)})"

    def op_st(self, how: list[str], address: str, source: str) -> str:
        size = SIZES[how[-1]]
        parts = ", ".join(f"{self.bits(p.strip())} & {(1 << 8 * size) - 1}" for p in source.strip("{} ").split(","))
        return f"m.store({self.address(address)}, {size}, [{parts}])"

    def _arithmetic(self, how: list[str], to: str, a: str, b: str, sign: str) -> str:
        kind = how[-1]
        expression = f"{self.value(a, kind)} {sign} {self.value(b, kind)}"
        return self.to(to, f"f32({expression})" if kind == "f32" else expression)

    def op_add(self, how: list[str], to: str, a: str, b: str) -> str:
        return self._arithmetic(how, to, a, b, "+")

    def op_sub(self, how: list[str], to: str, a: str, b: str) -> str:
        return self._arithmetic(how, to, a, b, "-")

    def op_mul(self, how: list[str], to: str, a: str, b: str) -> str:
        return self._arithmetic(how, to, a, b, "*")  # .lo and .wide: the register's width says which

    def op_mad(self, how: list[str], to: str, a: str, b: str, c: str) -> str:
        kind = how[-1]
        return self.to(to, f"{self.value(a, kind)} * {self.value(b, kind)} + {self.value(c)}")

    def op_fma(self, how: list[str], to: str, a: str, b: str, c: str) -> str:
        return self.to(to, f"fma{how[-1][1:]}({self.value(a)}, {self.value(b)}, {self.value(c)})")

    def op_div(self, how: list[str], to: str, a: str, b: str) -> str:
        kind = how[-1]
        x, y = self.value(a, kind), self.value(b, kind)
        if kind[0] == "f":
            assert how[0] == "rn", how
        return self.to(
            to, {"f32": f"f32(divide({x}, {y}))", "f64": f"divide({x}, {y})"}.get(kind, f"quotient({x}, {y})")
        )

    def op_rem(self, how: list[str], to: str, a: str, b: str) -> str:
        x, y = self.value(a, how[-1]), self.value(b, how[-1])
        return self.to(to, f"{x} - quotient({x}, {y}) * {y}")

    def op_rcp(self, how: list[str], to: str, a: str) -> str:
        return self.op_div(how, to, "0f3F800000" if how[-1] == "f32" else "0d3FF0000000000000", a)

    def op_sqrt(self, how: list[str], to: str, a: str) -> str:
        assert how[0] == "rn", how
        return self.to(to, f"f32(root({self.value(a)}))" if how[-1] == "f32" else f"root({self.value(a)})")

    def op_neg(self, how: list[str], to: str, a: str) -> str:
        return self.to(to, f"-{self.value(a, how[-1])}")

    def op_abs(self, how: list[str], to: str, a: str) -> str:
        return self.to(to, f"abs({self.value(a, how[-1])})")

    def op_min(self, how: list[str], to: str, a: str, b: str) -> str:
        return self.to(to, f"min({self.value(a, how[-1])}, {self.value(b, how[-1])})")

    def op_max(self, how: list[str], to: str, a: str, b: str) -> str:
        return self.to(to, f"max({self.value(a, how[-1])}, {self.value(b, how[-1])})")

    def op_not(self, how: list[str], to: str, a: str) -> str:
        return self.to(to, f"not {self.value(a)}" if how[-1] == "pred" else f"~{self.value(a)}")

    def _logic(self, how: list[str], to: str, a: str, b: str, sign: str) -> str:
        return self.to(to, f"{self.value(a, how[-1])} {sign} {self.value(b, how[-1])}")

    def op_and(self, how: list[str], to: str, a: str, b: str) -> str:
        return self._logic(how, to, a, b, "&")

    def op_or(self, how: list[str], to: str, a: str, b: str) -> str:
        return self._logic(how, to, a, b, "|")

    def op_xor(self, how: list[str], to: str, a: str, b: str) -> str:
        return self._logic(how, to, a, b, "^")

    def op_shl(self, how: list[str], to: str, a: str, b: str) -> str:
        return self.to(to, f"{self.value(a)} << {self.value(b)}")

    def op_shr(self, how: list[str], to: str, a: str, b: str) -> str:
        return self.to(to, f"{self.value(a, how[-1])} >> {self.value(b)}")

    def op_bfi(self, how: list[str], to: str, a: str, b: str, at: str, size: str) -> str:
        mask = (1 << int(size)) - 1 << int(at)
        return self.to(to, f"{self.value(b)} & ~{mask} | {self.value(a)} << {at} & {mask}")

    def op_selp(self, how: list[str], to: str, a: str, b: str, p: str) -> str:
        return self.to(to, f"{self.value(a, how[-1])} if {self.value(p)} else {self.value(b, how[-1])}")

    def op_setp(self, how: list[str], to: str, a: str, b: str) -> str:
        compare, kind = how[0], how[-1]
        x, y = self.value(a, kind), self.value(b, kind)
        ordered = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "hi": ">"}
        if compare in ordered and not (compare == "ne" and kind[0] == "f"):
            return self.to(to, f"{x} {ordered[compare]} {y}")
        unordered = f"({x} != {x} or {y} != {y})"
        special = {"nan": unordered, "num": f"not {unordered}", "ne": f"not {unordered} and {x} != {y}"}
        if compare in special:
            return self.to(to, special[compare])
        assert compare.endswith("u"), compare
        return self.to(to, f"{unordered} or {x} {ordered[compare[:-1]]} {y}")

    def op_cvt(self, how: list[str], to: str, a: str) -> str:
        *rounding, target, source = how
        x = self.value(a, source)
        narrow = {"bf16": f"to_bf16({x})", "f16": f"to_f16({x})"}
        if target in narrow:
            assert (rounding, source) == (["rn"], "f32"), how
            return self.to(to, narrow[target])
        if source == "f16":
            return self.to(to, f"from_f16({x})")
        if target == "f32":
            assert rounding == ["rn"], how
            return self.to(to, f"f32({x})")
        if target == "f64":
            return self.to(to, f"float({x})")
        assert target[0] != "f" and source[0] != "f", how  # noqa: PT018
        return self.to(to, x)


class Program:
    """A kernel's PTX, ready to run."""

    def __init__(self, ptx: tuple[str, ...]) -> None:
        named = next((found[0] for line in ptx if (found := re.search(r"\w+_param_0", line))), "")
        translate = _Translator(named)
        self._labels: dict[str, int] = {}
        blocks: list[list[str]] = [[]]
        for line in ptx:
            if line.endswith(":"):
                blocks.append([])
                self._labels[line[:-1]] = len(blocks) - 1
                continue
            for instruction in filter(None, (part.strip().removeprefix("{").strip() for part in line.split(";"))):
                if instruction == "}":
                    continue
                blocks[-1].append(instruction)
                if re.match(r"(@!?%p\d+ )?(bra|ret|shfl)", instruction):
                    blocks.append([])
        self._blocks: list[Block] = []
        for number, block in enumerate(blocks):
            body = [text for instruction in block for text in self._python(translate, instruction, number)]
            body.append(f"return {number + 1}")
            scope: dict[str, Any] = dict(globals())
            exec("def block(r, m):\n" + "\n".join("  " + line for line in body), scope)
            self._blocks.append(scope["block"])

    def _python(self, translate: _Translator, instruction: str, number: int) -> Iterator[str]:
        guard, text = "", instruction
        if found := re.match(r"@(!?)(%p\d+)\s+", instruction):
            guard = f"if {'not ' * bool(found[1])}r['{found[2]}']: "
            text = instruction[found.end() :]
        operation, _, rest = text.partition(" ") if "\t" not in text else text.replace("\t", " ", 1).partition(" ")
        operands = [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", rest)]
        if operation.startswith("bra"):
            yield f"{guard}return r['labels'][{operands[0]!r}]"
        elif operation == "ret":
            yield f"{guard}return None"
        elif operation.startswith("shfl"):
            assert operation == "shfl.sync.bfly.b32", operation
            assert not guard, instruction
            to = operands[0].split("|")[0]
            apart = translate.value(operands[2], "b32")
            yield f"r['shuffle'] = ({to!r}, {translate.value(operands[1])}, {apart})"
            yield f"return ~{number + 1}"
        else:
            lines = translate(operation, operands)
            if guard:
                yield guard
                yield from ("  " + line for line in lines)
            else:
                yield from lines

    def run(self, parameters: bytes, warps: int, memory: Memory, block_threads: int = 128) -> None:
        """Run so many warps, in blocks."""
        held = ctypes.create_string_buffer(len(parameters) + 16)
        base = ctypes.addressof(held) + -ctypes.addressof(held) % 16
        ctypes.memmove(base, parameters, len(parameters))
        memory.allow(base, len(parameters), "the parameters")
        for warp in range(warps):
            threads = range(warp * LANES, (warp + 1) * LANES)
            self._warp([self._registers(thread, block_threads, base) for thread in threads], memory)

    def _registers(self, thread: int, block_threads: int, parameters: int) -> Registers:
        place = {"%tid.x": thread % block_threads, "%ctaid.x": thread // block_threads}
        return {**place, "parameters": parameters, "labels": self._labels}

    def _warp(self, lanes: list[Registers], memory: Memory) -> None:
        at: list[int | None] = [0] * LANES
        while any(place is not None for place in at):
            for number, place in enumerate(at):
                at[number] = None if place is None else self._until_shuffle(place, lanes[number], memory)
            waiting = LANES - at.count(None)
            if not waiting:
                return
            assert waiting == LANES, "a shuffle that some lanes do not reach"
            values = [lane["shuffle"] for lane in lanes]
            for number, lane in enumerate(lanes):
                to, _, apart = values[number]
                lane[to] = values[number ^ apart][1]

    def _until_shuffle(self, place: int, registers: Registers, memory: Memory) -> int | None:
        """The block after the next shuffle; None at the end."""
        following: int | None = place
        while following is not None and following >= 0:
            following = self._blocks[following](registers, memory)
        return None if following is None else ~following
