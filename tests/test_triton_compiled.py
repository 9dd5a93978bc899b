"""The Triton kernels compiled for GPUs without one: what their PTX and their machine code say.

Everything up to the launch is real: `TritonPlan` calls its kernels with its own arguments, and a driver that only names
a target takes the place of CUDA's. By default every chain is compiled for sm_90 in the three main mixes of dtypes, and
the variants (misaligned, strided, centralised, AMP, float64, float16) for some chains. FASTOPT_AOT=1 compiles
everything for sm_80, 90 and 100.
"""

from __future__ import annotations

import collections
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cuda_listing
import pytest
import torch
from cases import Case, by_id, one_for_each_kernel
from test_device_steps import COUNTED, counted
from triton_chains import calls, chains

import fastopt
from fastopt import routing
from fastopt.backends import native, reference, triton
from fastopt.backends.amp import NONE, Amp
from fastopt.chain import Chain
from fastopt.setting import PULL

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 replaces the compiler"),
]
FULL = os.environ.get("FASTOPT_AOT") == "1"

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MIXES = {"fp32": (F32, F32), "bf16+fp32": (BF16, F32), "bf16": (BF16, BF16)}
REST = {"fp64": (F64, F64), "fp16": (F16, F16), "fp16+fp32": (F16, F32), "fp32+bf16": (F32, BF16)}
ALL = {**MIXES, **REST, "fp64+bf16": (F64, BF16)}  # of which the last takes 8 bytes of a state at a time


@dataclass(frozen=True)
class Variant:
    """One way to compile a chain: dtypes of p and g and of the states, and how memory lies."""

    dtypes: tuple[torch.dtype, torch.dtype] = MIXES["fp32"]
    layout: str = "aligned"
    slices: str = "none"
    scaled: bool = False
    capability: int = 90

    @property
    def ident(self) -> str:
        names = {value: key for key, value in ALL.items()}
        parts = [names[self.dtypes], self.layout, self.slices, "amp" if self.scaled else "", f"sm{self.capability}"]
        return "-".join(part for part in parts if part not in ("", "none"))


@dataclass
class Target:
    """What Triton asks of a driver before it launches."""

    capability: int
    kernels: list[Any] = field(default_factory=list)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps one cache of kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    """Launches compile and are collected."""
    from triton import compiler
    from triton.runtime import jit

    target = Target(90)
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def start(self: Any, grid: Any) -> Any:
        return lambda *args: target.kernels.append(self)

    monkeypatch.setattr(jit.JITFunction, "run", compile_only)
    monkeypatch.setattr(compiler.CompiledKernel, "__getitem__", start)
    monkeypatch.setattr(type(jit.driver), "active", property(lambda self: target), raising=False)
    return target


def bucket(chain: Chain, variant: Variant) -> triton.tables.Bucket:
    """Parameters of the wanted kind, one of them."""
    n, offset = 4 * 40_000 if variant.slices == "split" else 4 * 4096, 1 if variant.layout == "misaligned" else 0
    pg, s = variant.dtypes

    def tensor(dtype: torch.dtype) -> torch.Tensor:
        flat = torch.empty(2 * n + 1, dtype=dtype)
        strides = (2 * (n // 4), 2) if variant.layout == "strided" else (n // 4, 1)
        return flat.as_strided((4, n // 4), strides, offset)

    length = 0 if variant.slices == "none" else n // 4
    first = 1 if chain is PULL else 0
    states = [tensor(s) for _ in range(first + len(chain.state))]
    p = tensor(pg)
    entry = triton.tables.Entry(p, p, 0, states, [], p.stride(), length, False)
    triton.tables.classify(entry, pg, triton.tables.TILE)
    return triton.tables.Bucket(entry.key, [entry], 0, triton.tables.TILE)


def compile_chain(chain: Chain, variant: Variant, target: Target) -> list[Any]:
    """The kernels of one launch."""
    target.capability, target.kernels = variant.capability, []
    plan, b = triton.plan.TritonPlan(lambda group: None), bucket(chain, variant)  # type: ignore[arg-type, return-value]
    grads, rows = (triton.launch.Addressed(torch.zeros(4, dtype=d), 1) for d in (torch.int64, torch.int32))
    coefficients = triton.launch.Addressed(torch.zeros(16, dtype=b.key.compute), 2)
    amp = Amp(torch.ones(()), torch.zeros(())) if variant.scaled else NONE
    first_slot = 1 if chain is PULL else 0
    scaler = triton.launch.Scaler(amp, torch.device("cpu"))
    for ready, start in plan._bound(b, chain, first_slot, b.key.aligned, grads, rows, coefficients, scaler):
        ready.start(start)
    return target.kernels


def counts(ptx: str) -> collections.Counter[str]:
    """How often each instruction occurs."""
    return collections.Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*(?:[.:]+\w+)*)", ptx, re.MULTILINE))


def total(found: collections.Counter[str], pattern: str) -> int:
    return sum(n for name, n in found.items() if re.fullmatch(pattern, name))


def resources(kernel: Any, tmp_path: Path) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the machine code."""
    import triton as package

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(package.__file__).parent / "backends/nvidia/bin/cuobjdump"
    result = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", result.stdout)}


def check_arithmetic(chain: Chain, found: collections.Counter[str], tiles: int, variant: Variant) -> None:
    """As many multiply-adds, divisions and roots as the stages write, and nothing that the assembler may contract.

    `tiles` is how many elements the program text updates: those of one thread, and one of the last few.
    """
    kind = "f64" if variant.dtypes[0] == F64 else "f32"
    for name, instruction in (("fma", "fma"), ("div_rn", "div"), ("sqrt_rn", "sqrt")):
        written = sum(calls(stage, name) for stage in chain.stages)
        extra = tiles if name == "div_rn" and variant.scaled else 0
        # sm_100 has two operations in one instruction.
        got = total(found, rf"{instruction}\.rn\.{kind}") + 2 * total(found, rf"{instruction}\.rn\.{kind}x2")
        assert got == written * tiles + extra, (instruction, found)
    check_ieee(found)


def check_ieee(found: collections.Counter[str]) -> None:
    """Nothing approximate, and nothing that may be contracted: an operation with .rn is what it says (PTX ISA)."""
    assert not [n for n in found if re.search(r"approx|\bftz\b|div\.full|ex2|lg2", n)]
    unrounded = r"(add|sub|mul|fma|mad|div|sqrt|rcp)\.(?!rn\.)[.\w]*f(32|64)(x2)?"
    assert not [n for n in found if re.fullmatch(unrounded, n)]


def check_copies(kernel: Any, variant: Variant) -> None:
    """The last 16 elements are fewer than threads: some hold copies, read perhaps after the owner has written.

    Triton stores from the owner alone. But a change of layout goes through shared memory, where any copy may win.
    """
    assert not re.search(r"convert_layout[^\n]*tensor<16x", kernel.asm["ttgir"])
    assert "tensor<16x" in kernel.asm["ttgir"] or variant.layout != "aligned"


def check_accesses(chain: Chain, found: collections.Counter[str], b: triton.tables.Bucket, variant: Variant) -> None:
    """Every access to a stream is 16 bytes wide, except those of the last few elements."""
    per_thread = b.tile.elements(b.key) // (32 * b.tile.warps)
    first = 1 if chain is PULL else 0
    states = b.key.states[first : first + len(chain.state)]
    read = [b.key.p, *states, *([] if chain is PULL else [b.key.g])]
    written = [b.key.p, *states, *([b.key.g] if variant.scaled else [])]
    wide, narrow = r"\.global[.:\w]*\.(v4\.b32|v2\.b64)", r"\.global(?!.*\.v\d)[.:\w]*\.b(8|16|32|64)"
    assert total(found, "st" + wide) == sum(per_thread * d.itemsize // 16 for d in written)
    assert total(found, "st" + narrow) == len(written)
    assert total(found, "ld" + wide) == sum(per_thread * d.itemsize // 16 for d in read)
    # Item, row, length, addresses, coefficients, scale and overflow are numbers; the last elements go one by one.
    numbers = 2 + 1 + 1 + len(read) + len(chain.coefficients) + (2 if variant.scaled else 0)
    assert total(found, "ld" + narrow) <= numbers + len(read)
    assert total(found, r"ld\.global.*") == total(found, "ld" + wide) + total(found, "ld" + narrow)


def check_occupancy(
    kernel: Any, b: triton.tables.Bucket, streams: list[torch.dtype], capability: int, tmp_path: Path
) -> None:
    """No spills, and enough loads in flight on an SM.

    An SM has 65,536 registers and holds at most 2,048 threads. CUB keeps 48 KB in flight on an H200
    (cub/device/dispatch/tuning/tuning_transform.cuh); a plain SGD step cannot have more than 2,048 threads' worth.
    """
    used = resources(kernel, tmp_path)
    assert used["LOCAL"] == 0
    # To fit another block on an SM, the assembler keeps one address of a few chains on the stack, written and read once
    # in the kernel (one STL.64, one LDL.64). Which chains differs by version and target: none here.
    none = capability == 90 and importlib.metadata.version("triton").startswith("3.6.")
    assert used["STACK"] <= (0 if none else 8)
    threads = 32 * b.tile.warps
    blocks = min(65_536 // (-(-used["REG"] // 8) * 8 * threads), 2048 // threads, 32)
    in_flight = blocks * b.tile.elements(b.key) * sum(d.itemsize for d in streams)
    assert in_flight >= 48 * 1024, f"{used}: {blocks} blocks, {in_flight} bytes in flight"


def variants(dtypes: tuple[torch.dtype, torch.dtype], capability: int = 90) -> Iterator[Variant]:
    """Every other way to compile a chain."""
    for layout in ("aligned", "misaligned", "strided"):
        for slices in ("none", "rows", "split"):
            for scaled in (False, True):
                yield Variant(dtypes, layout, slices, scaled, capability)


def main_list() -> list[Any]:
    wanted = [(chain, Variant(dtypes)) for chain in chains().values() for dtypes in MIXES.values()]
    if FULL:
        wanted = [
            (chain, Variant(dtypes, layout, "none", False, capability))
            for chain in chains().values()
            for dtypes in (MIXES | REST).values()
            for layout in ("aligned", "misaligned")
            for capability in (80, 90, 100)
        ]
    return [pytest.param(chain, variant, id=f"{chain.name}-{variant.ident}") for chain, variant in wanted]


VARIED = ["scale+l2+amsgrad+lookahead", "scale+shrink+radam+lookahead", "lookahead"]


def variant_list() -> list[Any]:
    mixes = list(ALL.values())
    wanted = [
        (name, variant)
        for name in VARIED
        for k, variant in enumerate(
            v for c in ((80, 90, 100) if FULL else (90,)) for d in mixes for v in variants(d, c)
        )
        if FULL or k % 5 == 0  # 5 has no factor in common with the 18 variants of a mix: all of them occur
    ]
    return [pytest.param(chains()[name], variant, id=f"{name}-{variant.ident}") for name, variant in wanted]


@pytest.mark.parametrize(("chain", "variant"), main_list())
def test_chain(chain: Chain, variant: Variant, target: Target, tmp_path: Path) -> None:
    (kernel,) = compile_chain(chain, variant, target)
    b, found = bucket(chain, variant), counts(kernel.asm["ptx"])
    per_thread = b.tile.elements(b.key) // (32 * b.tile.warps)
    aligned = variant.layout == "aligned"
    check_arithmetic(chain, found, per_thread + (1 if aligned else 0), variant)
    check_copies(kernel, variant)
    if aligned:
        check_accesses(chain, found, b, variant)
        streams = [variant.dtypes[0]] * 2 + [variant.dtypes[1]] * len(chain.state)
        check_occupancy(kernel, b, streams, variant.capability, tmp_path)
    else:
        assert resources(kernel, tmp_path)["LOCAL"] == 0


@pytest.mark.parametrize(("chain", "variant"), variant_list())
def test_variant(chain: Chain, variant: Variant, target: Target, tmp_path: Path) -> None:
    kernels = compile_chain(chain, variant, target)
    assert len(kernels) == (2 if variant.slices == "split" and chain is not PULL else 1)
    for kernel in kernels:
        assert resources(kernel, tmp_path)["LOCAL"] == 0
        found = counts(kernel.asm["ptx"])
        check_ieee(found)
        check_copies(kernel, variant)
    if not {BF16, F16}.isdisjoint(variant.dtypes):
        narrowing = [n for n in counts(kernels[-1].asm["ptx"]) if re.fullmatch(r"cvt\.\w*\.?(b?f16)(x2)?\.f32", n)]
        assert narrowing
        assert all(n.startswith("cvt.rn.") for n in narrowing)


def test_every_compiled_chain_has_a_triton_kernel() -> None:
    if native.extension() is None:
        pytest.skip("the list of compiled chains is in the extension, which is not built")
    assert set(native.extension().chain_names()) == set(chains())  # type: ignore[union-attr]


def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's plan take CPU tensors, which no launch will touch, and count steps where they are."""
    monkeypatch.setitem(fastopt.backends._WHY_NOT, "triton", lambda device: "")
    why_not = routing.why_not_setting
    monkeypatch.setattr(routing, "why_not_setting", lambda setting, p, _=False: why_not(setting, p, True))


@pytest.mark.parametrize("counted", [{}, {"capturable": True}], ids=["", "counted"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Ranger"])
def test_no_value_recompiles(
    name: str, counted: dict[str, Any], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, learning rates, sizes, absent gradients, loss scales: every step runs what the first ones compiled."""
    fake_gpu(monkeypatch)
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 16, 17, 5000, 0)]
    params += [torch.nn.Parameter(torch.zeros(3, 16))]
    counted = {"fused": True} if name == "SGD" and counted else counted
    optimizer = getattr(fastopt, name)(params, lr=1.0, backend="triton", **counted)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(12):  # Ranger synchronises and starts to rectify
        optimizer.step()
    compiled = set(map(id, target.kernels))
    optimizer.param_groups[0]["lr"] = 0
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(16)) for _ in range(16)], "lr": 16})
    for step in range(13):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = None if (i + step) % 3 == 0 else torch.zeros_like(p)
        optimizer.step()
    assert set(map(id, target.kernels)) == compiled


def rows_kernel(case: Case, dtype: torch.dtype, target: Target, astray: bool = False) -> Any:
    """The kernel that makes the rows of a case whose steps a device counts, with all that a step may be asked."""
    params = [torch.nn.Parameter(torch.zeros(3, 4, dtype=dtype)) for _ in range(3)]
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}], "triton", **counted(case))
    for p in params[1:]:
        p.grad = torch.zeros(13, dtype=dtype)[1:].view(3, 4) if astray else torch.zeros_like(p)
    found = []
    for _ in range(2):  # Lookahead counts its first step on the host
        target.kernels = []
        optimizer.step()
        found = [kernel for kernel in target.kernels if triton.rows.NAME in kernel.name]
    (kernel,) = found
    return kernel


@pytest.mark.parametrize("capability", [80, 90, 100] if FULL else [90])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [  # what a row is stored as makes little difference to how it is made, nor do values without a chain of their own
        pytest.param(case, dtype, id=f"{case.id}-{name}")
        for k, case in enumerate(COUNTED)
        for name, dtype in (("fp32", F32), ("fp64", F64))
        if FULL or (case in one_for_each_kernel() if dtype == F32 else k % 6 == 0)
    ],
)
def test_rows_kernel(
    case: Case, dtype: torch.dtype, capability: int, target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """IEEE arithmetic in float64, no spills; only within the power is there an approximation, of which it is made."""
    fake_gpu(monkeypatch)
    target.capability = capability
    texts = set()
    for astray in (False, True):
        kernel = rows_kernel(case, dtype, target, astray)
        used = resources(kernel, tmp_path)
        assert used["LOCAL"] == used["STACK"] == used["SHARED"] == 0
        power, rest = split_power(kernel.asm["ptx"])
        check_ieee(counts(rest))
        texts.add(rest)
    assert len(texts) == 2
    assert power or case.name in ("Adagrad", "RMSprop")
    # A first guess that is then improved, and a look at the exponent, which no subnormal number can mislead.
    check_ieee(counts(power) - collections.Counter({"rcp.approx.ftz.f64": 1, "abs.ftz.f32": 1}))


def split_power(ptx: str) -> tuple[str, str]:
    """CUDA's power, which is one function of its own however often it is called, and everything else."""
    start = re.search(r"\.func[^;{]*__internal_accurate_pow\s*\([^;{]*\{", ptx)
    if start is None:
        return "", ptx
    end = ptx.index("\n}", start.end())
    return ptx[start.start() : end], ptx[: start.start()] + ptx[end:]


def test_nothing_is_counted_where_a_kernel_cannot_be_compiled(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows' kernel advances the counters, so it starts when all that read the rows are there."""
    from triton.runtime import jit

    fake_gpu(monkeypatch)
    compile_only = jit.JITFunction.run

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__name__ != triton.rows.NAME:
            raise ValueError("out of registers")
        return compile_only(self, *args, **kwargs)

    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = fastopt.RAdam([p], capturable=True, backend="triton")
    p.grad = torch.zeros(4)
    with monkeypatch.context() as patch:
        patch.setattr(jit.JITFunction, "run", refuse)
        with pytest.raises(RuntimeError, match="fastopt_scale_shrink_radam failed on cpu: out of registers"):
            optimizer.step()
    assert target.kernels == []
    optimizer.step()
    assert len(target.kernels) == 2


def test_variants_are_compiled_once_each(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever combination of them a step needs."""
    fake_gpu(monkeypatch)
    params = [torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in (F32, F64)]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(params, (0.0, 0.1), strict=True)]
    optimizer = fastopt.Adamax(groups, capturable=True, backend="triton")
    for step in range(8):
        for k, p in enumerate(params):
            p.grad = None if step >> k & 1 else torch.zeros_like(p)
        optimizer.step()
    kernels = {id(kernel) for kernel in target.kernels if triton.rows.NAME in kernel.name}
    assert len(kernels) == 1  # both were needed in the first step


def test_the_power_is_the_one_that_nvcc_compiles(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton brings a libdevice of its own: the same polynomials, so that both backends make the same rows."""
    listings = sorted(cuda_listing.ROOT.glob("build/*/cuda_driver.*.o.kept/cuda_driver.ptx"))
    if not listings:
        pytest.skip("no CUDA driver was built here")
    fake_gpu(monkeypatch)
    ours, _ = split_power(rows_kernel(by_id("adam")[0], F32, target).asm["ptx"])
    theirs, _ = split_power(listings[-1].read_text(encoding="utf-8"))
    found = [set(re.findall(r"0d[0-9A-F]{16}", text)) for text in (ours, theirs)]
    assert found[0] == found[1]
    assert len(found[0]) > 20


STAGES = """
from fastopt.chain import stage, tl


@stage("buf")
def edited(p, g, buf, lr):
    buf = {form}
    p = tl.fma(lr, buf, p)
    return p, g, buf
"""


def test_an_edited_stage_is_another_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's cache on disk is keyed by the text of the kernel and of all that it calls."""
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for k, form in enumerate(("buf + g", "buf - g", "buf + g")):
        (tmp_path / f"stages_{k}.py").write_text(STAGES.format(form=form), encoding="utf-8")
        chain = Chain((importlib.import_module(f"stages_{k}").edited,))
        keys.append(triton.kernels.kernel(chain).cache_key)
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_an_edited_stage_runs_its_new_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    subtractions = []
    for k, form in enumerate(("buf * g", "buf - g")):
        (tmp_path / f"forms_{k}.py").write_text(STAGES.format(form=form), encoding="utf-8")
        chain = Chain((importlib.import_module(f"forms_{k}").edited,))
        (kernel,) = compile_chain(chain, Variant(), target)
        subtractions.append(total(counts(kernel.asm["ptx"]), r"sub\.rn\.f32"))
    assert subtractions[0] == 0 < subtractions[1]


def test_stages_are_bound_and_not_rewritten() -> None:
    """The kernel calls the stages of stages.py themselves: Triton has their source, line for line."""
    import inspect

    chain = chains()["scale+shrink+adam"]
    kernel = triton.kernels.kernel(chain)
    for stage in chain.stages:
        text = inspect.getsource(stage.function)
        assert text[text.index("def ") :] == kernel.__globals__[f"apply_{stage.name}"].src
    assert reference._program(chain) is not None
