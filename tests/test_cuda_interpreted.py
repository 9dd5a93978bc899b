"""The CUDA kernels' compiled code, run lane by lane on the CPU (ptx_interpreter.py), against the reference backend.

Bit for bit in fp32 and fp64; in 16 bits too, since both compute in fp32 and round once. Every access is checked to lie
in what the kernel was given and to be aligned. Tensors have ragged ends, absent gradients and several work items.
"""

from __future__ import annotations

import dataclasses
import os
import re
import struct
from dataclasses import dataclass, field
from functools import cache

import cuda_listing
import pytest
import torch
from cuda_listing import MIXES, Kernel
from ptx_interpreter import LANES, Memory, Program
from test_cuda_compiled import of
from torch import Tensor

from fastopt import stages
from fastopt.backends import reference
from fastopt.chain import Chain

AOT = os.environ.get("FASTOPT_AOT") == "1"
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CHUNK = 256
SLOTS = 4
HEADER = struct.Struct("<5Q2I2H2I2h")
TENSOR = struct.Struct("<Q4Q2q2Q7bx")
ONE_OF_EACH = ("scale+l2+nesterov+sgd", "scale+shrink+adam", "scale+l2+adamax+lookahead", "scale+shrink+nadam")


def chain_of(name: str) -> Chain:
    return Chain(tuple(getattr(stages, stage) for stage in name.split("+")))


def dtypes(mix: str) -> tuple[torch.dtype, torch.dtype]:
    """Of parameter and gradient, and of the states. Where any will do: an unusual pair."""
    if mix == "any_f32":
        return torch.bfloat16, torch.float32
    if mix == "any_f64":
        return torch.float64, torch.float32
    parameter, _, state = mix.partition("_")
    return DTYPES[parameter], DTYPES[state or parameter]


@dataclass
class Launch:
    """Tensors and the parameters of a launch that updates them, as device_plan.cpp would make them."""

    kernel: Kernel
    memory: Memory = field(default_factory=Memory)
    held: list[Tensor] = field(default_factory=list)
    rows: list[tuple[float, ...]] = field(default_factory=list)
    table: list[bytes] = field(default_factory=list)
    items: list[tuple[int, int]] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    expected: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    scale: float | None = None
    found_inf: float | None = None
    rows_on_device: bool = False

    @property
    def together(self) -> int:
        """Elements that eight warps take turns at, a vector for each lane and then another."""
        return 2 * 8 * LANES * self.kernel.elements if self.kernel.dense else 0

    def items_of(self, numel: int, length: int) -> int:
        if length > 4096:
            return numel // length * -(-length // 4096)
        if length:
            return -(-(numel // length) // max(1, CHUNK // length))
        if not self.kernel.dense:
            return -(-numel // CHUNK)
        return numel // self.together * 8 + min(8, -(-(numel % self.together) // (LANES * self.kernel.elements)))

    @property
    def chain(self) -> Chain:
        return chain_of(self.kernel.chain)

    def address(self, tensor: Tensor, name: str) -> int:
        self.held.append(tensor)
        self.memory.allow(tensor.data_ptr(), tensor.numel() * tensor.element_size(), name)
        return tensor.data_ptr()

    def add(self, shape: tuple[int, ...], gradient: bool = True, offset: int = 0, stored: str | None = None) -> None:
        """A tensor, which begins `offset` elements after a multiple of 64 bytes; its row is its number modulo two.
        `stored`: as what a kernel for any dtypes knows it, if not as such."""
        number, chain = len(self.table), self.chain
        dtype, state_dtype = dtypes(self.kernel.mix)
        numel = torch.Size(shape).numel()
        streams = [torch.randn(numel + offset).to(dtype)[offset:].view(shape) for _ in range(2)]
        state = [torch.rand(numel + offset).to(state_dtype)[offset:].view(shape) for _ in chain.state]
        p, g = streams
        centralised = self.kernel.centralised and len(shape) > 1
        want = [t.clone() for t in (p, g, *state)]
        if gradient and not self.found_inf:
            compute = torch.float64 if self.kernel.mix.endswith("f64") else torch.float32
            grad = g.to(compute)
            if self.scale is not None:
                grad = grad / torch.tensor(self.scale, dtype=compute)
                want[1].copy_(grad)
            reference.launch(chain, want[0], grad, want[2:], self.rows[number % 2], shape[0] if centralised else 0)
        names = ("p", "g", *chain.state)
        addresses = [self.address(t, f"{n}{number}") for n, t in zip(names, (p, g, *state), strict=True)]
        self.expected += zip((p, g, *state), want, strict=True)
        length = numel // shape[0] if centralised else 0
        slots = [*addresses[2:], *[0] * SLOTS][:SLOTS]
        codes = [CODES[t.dtype] for t in (p, g, *state)]
        parts = self.parts(number, shape[0], length)
        codes += [0] * (6 - len(codes)) + [MIXES.index(stored or self.kernel.mix)]
        self.table.append(TENSOR.pack(addresses[0], *slots, numel, length, parts, 0, *codes))
        self.gradients.append(addresses[1] if gradient else 0)
        self.items += [(number, chunk) for chunk in range(self.items_of(numel, length))]

    def parts(self, number: int, rows: int, length: int) -> int:
        if length <= 4096:
            return 0
        return self.address(torch.zeros(rows * -(-length // 16384), 2, dtype=torch.float64), f"parts{number}")

    def scalar(self, value: float | None, name: str) -> int:
        return 0 if value is None else self.address(torch.tensor(value), name)

    def bytes_of(self, items: list[tuple[int, int]]) -> bytes:
        """The parameters of a launch over these items."""
        table = torch.frombuffer(bytearray(b"".join(self.table)), dtype=torch.uint8).clone()
        listed = torch.tensor(items, dtype=torch.int32)
        letter = "d" if self.kernel.mix.endswith("f64") else "f"
        indices_at = 8 * len(self.gradients)
        rows_at = -(-(indices_at + 2 * len(self.gradients)) // 16) * 16
        values = [value for row in self.rows for value in row]
        payload = struct.pack(f"<{len(self.gradients)}Q", *self.gradients)
        payload += struct.pack(f"<{len(self.gradients)}H", *(k % 2 for k in range(len(self.gradients))))
        payload = payload.ljust(rows_at, b"\0") + (
            b"" if self.rows_on_device else struct.pack(f"<{len(values)}{letter}", *values)
        )
        made = b"".join(
            struct.pack("<16di4x", *[*self.rows[k % 2], *[0.0] * 16][:16], 7) for k in range(len(self.gradients))
        )
        device_rows = torch.frombuffer(bytearray(made), dtype=torch.uint8).clone()
        header = HEADER.pack(
            self.address(table, "table"),
            self.address(listed, "items"),
            self.address(device_rows, "rows") if self.rows_on_device else 0,
            self.scalar(self.found_inf, "found_inf"),
            self.scalar(self.scale, "grad_scale"),
            *(len(items), 0, self.together, CHUNK.bit_length() - 1, indices_at, rows_at, 7, 0),
        )
        return (header + payload).ljust(self.kernel.parameter_bytes, b"\0")

    def check(self) -> None:
        if sums := self.sum_items():
            program_of_sums(self.kernel).run(self.bytes_of(sums), len(sums), self.memory)
        warps = -(-len(self.items) // 4) * 4  # whole blocks: the surplus warps must do nothing
        program(self.kernel).run(self.bytes_of(self.items), warps, self.memory)
        for k, (got, want) in enumerate(self.expected):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda text, k=k: f"{k}: {text}")

    def sum_items(self) -> list[tuple[int, int]]:
        found = []
        for number, row in enumerate(self.table):
            numel, length = TENSOR.unpack(row)[5:7]
            if length > 4096:
                found += [(number, part) for part in range(numel // length * -(-length // 16384))]
        return found


@cache
def program(kernel: Kernel) -> Program:
    return Program(kernel.ptx)


@cache
def program_of_sums(kernel: Kernel) -> Program:
    """The kernel that sums long slices, for the same size of parameters."""
    script = cuda_listing.build_script()
    assert script is not None
    wanted = f"sum_rows_kernelI{'d' if kernel.mix.endswith('f64') else 'f'}Li{kernel.tier}E"
    for path in script.build_folder(script.Torch.find()).glob("cuda_driver.*.kept/*.ptx"):
        text = path.read_text()
        if f".target {kernel.arch}\n" in text:
            return next(Program(lines) for entry, _, lines in cuda_listing.bodies(text) if wanted in entry)
    raise AssertionError(f"no PTX of cuda_driver.cu for {kernel.arch}")


def rows_for(chain: Chain) -> list[tuple[float, ...]]:
    """Two rows of coefficients, in either arm of every select; decays and factors near one."""
    generator = torch.Generator().manual_seed(len(chain.coefficients))
    low, high = (torch.rand(len(chain.coefficients), generator=generator, dtype=torch.float64) * 0.4 for _ in range(2))
    dtype = torch.float32
    return [tuple((low + 0.05).to(dtype).tolist()), tuple((high + 0.55).to(dtype).tolist())]


def launch(kernel: Kernel, **settings: float | bool) -> Launch:
    torch.manual_seed(0)
    return Launch(kernel, rows=rows_for(chain_of(kernel.chain)), **settings)  # type: ignore[arg-type]


def selected(mix: str, centralised: bool = False, scaled: bool = False) -> list[Kernel]:
    """The kernels of sm_90 that are run: every chain in fp32, one of each kind elsewhere."""
    tier = int(scaled and not mix.startswith("any_"))
    kernels = [k for k in of(mix, "sm_90") if (k.tier, k.centralised, k.scaled) == (tier, centralised, scaled)]
    return [k for k in kernels if AOT or centralised or mix == "f32" or k.chain in ONE_OF_EACH]


def mixes() -> tuple[str, ...]:
    return MIXES if AOT else ("f32", "bf16_f32", "bf16", "any_f32", "any_f64")


every_mix = pytest.mark.parametrize("mix", mixes())


@every_mix
def test_every_chain_equals_the_reference(mix: str) -> None:
    for kernel in selected(mix):
        case = launch(kernel)
        for numel, gradient in ((0, True), (1, True), (300, True), (64, False), (23, True)):
            case.add((numel,), gradient)
        case.check()


@pytest.mark.parametrize("mix", [mix for mix in mixes() if not mix.startswith("any_")])
def test_vectors_as_far_as_they_reach(mix: str) -> None:
    """Across the warps that take turns, twice; what is less than a vector at the end goes one by one, nothing else."""
    kernel = next(k for k in selected(mix) if k.chain == "scale+shrink+adam")
    case = launch(kernel)
    whole, rest = case.together + 5, kernel.elements - 1
    case.add((whole * kernel.elements + rest,))
    case.check()
    size = case.expected[0][0].element_size()
    assert {of: n for (name, of), n in case.memory.stores.items() if name == "p0"} == {
        size * kernel.elements: whole,
        size: rest,
    }


@every_mix
def test_gradients_are_unscaled_and_written_back(mix: str) -> None:
    for kernel in selected(mix, scaled=True)[:3]:
        case = launch(kernel, scale=3.0)
        case.add((301,))
        case.check()


@every_mix
def test_an_overflow_leaves_everything_as_it_was(mix: str) -> None:
    kernel = selected(mix, scaled=True)[0]
    case = launch(kernel, scale=3.0, found_inf=1.0)
    case.add((41,))
    case.check()


@every_mix
def test_rows_made_on_the_device(mix: str) -> None:
    kernel = selected(mix)[1]
    case = launch(kernel, rows_on_device=True)
    case.add((41,))
    case.add((5,))
    case.check()


@every_mix
def test_centralised_slices(mix: str) -> None:
    """Of a length that packs several into an item, of one that an item splits, and of one that is no multiple of 16."""
    for kernel in selected(mix, centralised=True)[:2]:
        case = launch(kernel)
        for shape in ((5, 48), (3, 300), (7, 11), (40,)):
            case.add(shape)
        case.check()


@pytest.mark.parametrize("mix", ["f32", "bf16"])
def test_slices_too_long_for_a_warp(mix: str) -> None:
    (kernel, *_) = selected(mix, centralised=True)
    case = launch(kernel)
    case.add((2, 4097))
    case.check()


@pytest.mark.parametrize("mix", ["any_f32"])
def test_misaligned_tensors(mix: str) -> None:
    kernel = selected(mix)[0]
    case = launch(kernel)
    case.add((77,), offset=1)
    case.check()


def test_misaligned_tensors_of_known_dtypes() -> None:
    """Many elements at a time, a lane's a warp apart; rows of their own where slices are centralised."""
    for kernel in (*selected("any_f32"), *selected("any_f32", centralised=True)[:2]):
        case = launch(kernel)
        for shape in ((300,), (3, 140), (127,), (128,)):
            case.add(shape, offset=1, stored="bf16_f32")
        case.check()


def test_the_interpreter_refuses_what_a_device_would() -> None:
    """A vector access to a misaligned tensor, and one past the end of a tensor."""
    kernel = selected("f32")[0]
    case = launch(kernel)
    case.add((77,), offset=1)
    with pytest.raises(MemoryError, match="misaligned"):
        case.check()
    case = launch(kernel)
    case.add((77,))
    case.memory._ranges = [(a, b - 4 * name.startswith("g"), name) for a, b, name in case.memory._ranges]
    with pytest.raises(MemoryError, match="belong to nothing"):
        case.check()


def contracted(ptx: tuple[str, ...]) -> tuple[str, ...]:
    """With every difference a * b - c fused, as a compiler would that is allowed to."""
    products = {found[1]: found[2] for line in ptx if (found := re.match(r"mul\.rn\.f32\s+(%f\d+), (.*);", line))}
    lines = []
    for line in ptx:
        found = re.match(r"sub\.rn\.f32\s+(%f\d+), (%f\d+), (%f\d+);", line)
        if found and found[2] in products:
            lines += [f"neg.f32 %f9999, {found[3]};", f"fma.rn.f32 {found[1]}, {products[found[2]]}, %f9999;"]
        else:
            lines.append(line)
    return tuple(lines)


def test_a_contracted_product_would_be_seen() -> None:
    kernel = next(k for k in selected("f32") if k.chain == "scale+shrink+adam")
    case = launch(dataclasses.replace(kernel, ptx=contracted(kernel.ptx)))
    case.add((300,))
    with pytest.raises(AssertionError, match="not equal"):
        case.check()
