"""The CUDA kernels as nvcc and ptxas made them, where nobody runs one: registers, spills, widths of accesses, rounding.

`make test` has them built for sm_90 in three mixes where there is nvcc, `make aot` for every architecture and mix. The
checks are in cuda_listing.py; the last tests here show that each of them objects to a kernel it should object to.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import cuda_listing
import pytest
import torch
from cuda_listing import MIXES, ROOT, Kernel, kernels_of, wrong_accesses, wrong_arithmetic, wrong_resources

from fastopt import stages
from fastopt.backends import native

AOT = os.environ.get("FASTOPT_AOT") == "1"
MAIN = ("f32", "bf16_f32", "bf16")
ARCHS = ("sm_80", "sm_90", "sm_100") if AOT else ("sm_90",)
TIER_BYTES = (4080, 32752)

# Registers of a thread by the number of states, and what they mean in blocks of 128 threads: with 32 an SM holds 16 of
# them, with 40 12, 48 10, 56 9, 64 8, 72 7, 88 5, 96 5: from 88 to 96 nothing is lost. csrc/cuda_kernels.cu asks for
# them by what a kernel holds.
BUDGETS = {
    "f32": (32, 40, 56, 64, 64),
    "f64": (40, 56, 80, 88, 88),
    "bf16_f32": (32, 40, 48, 64, 72),
    "bf16": (32, 48, 56, 72, 72),
}
CENTRALISED = {"f32": 88, "f64": 128, "bf16_f32": 96, "bf16": 96}
# Kernels that divide by a loss scale, and those for any storage, are asked for nothing but not to spill.
OTHERS = {"scaled": 128, "any": 168}
ELSEWHERE = 16  # that ptxas takes more for sm_80 and sm_100


def slots(chain: str) -> int:
    return sum(len(getattr(stages, name).state) for name in chain.split("+"))


def budget(kernel: Kernel) -> int:
    more = 0 if kernel.arch == "sm_90" else ELSEWHERE
    mix = {"f16": "bf16", "f16_f32": "bf16_f32"}.get(kernel.mix, kernel.mix)
    if not kernel.dense or kernel.scaled:
        return more + OTHERS["any" if not kernel.dense else "scaled"]
    return more + (CENTRALISED[mix] if kernel.centralised else BUDGETS[mix][slots(kernel.chain)])


def sources() -> list[Path]:
    """cuda_kernels.cu and what it includes of ours."""
    found, pending = [], [ROOT / "csrc" / "cuda_kernels.cu"]
    while pending:
        if (source := pending.pop()) not in found:
            found.append(source)
            included = re.findall(r'^#include "(.*)"', source.read_text(encoding="utf-8"), re.MULTILINE)
            pending += [path for name in included if (path := source.parent / name).exists()]
    return found


@cache
def compiled() -> tuple[Kernel, ...]:
    """Every kernel that the last builds compiled from the present sources, each once."""
    script = cuda_listing.build_script()
    if script is None:
        return ()
    newest = max(source.stat().st_mtime for source in sources())
    found: dict[tuple[str, str], Kernel] = {}
    for log in script.build_folder(script.Torch.find()).glob("cuda_kernels.*.o.log"):
        if log.stat().st_mtime < newest:
            continue
        ptx = [path.read_text() for path in log.with_suffix(".kept").glob("*.ptx")]
        for kernel in kernels_of(log.read_text(), ptx):
            if kernel.arch in ARCHS:
                found[str(kernel), kernel.arch] = kernel
    return tuple(found.values())


def mixes() -> tuple[str, ...]:
    return MIXES if AOT else (*MAIN, "any_f32", "any_f64")


def of(mix: str, arch: str) -> list[Kernel]:
    kernels = [kernel for kernel in compiled() if (kernel.mix, kernel.arch) == (mix, arch)]
    if not kernels:
        if os.environ.get("FASTOPT_CUDA") == "1":
            pytest.fail(f"CUDA kernels were asked for, but none of {mix} for {arch} are in the build folder")
        pytest.skip("no CUDA kernels of the present sources were built (`make test` builds them where there is nvcc)")
    return kernels


every_build = pytest.mark.parametrize(("mix", "arch"), [(mix, arch) for arch in ARCHS for mix in mixes()])


def report(kernels: list[Kernel], problems: dict[str, list[str]]) -> str:
    shown = [f"{name}: {'; '.join(wrong[:3])}" for name, wrong in problems.items() if wrong]
    return f"{len(shown)} of {len(kernels)} kernels:\n" + "\n".join(shown[:20])


@every_build
def test_every_chain_is_compiled_for_both_sizes_of_parameters(mix: str, arch: str) -> None:
    """With a loss scale for the larger alone, and not where nothing is done with a gradient."""
    kernels = of(mix, arch)
    tiers = (0,) if mix.startswith("any_") else (0, 1)
    names = native.extension().chain_names()  # type: ignore[union-attr]
    assert Counter((k.chain, k.scaled, k.tier) for k in kernels if not k.centralised) == Counter(
        (chain, scaled, tier)
        for chain in names
        for scaled in (False, True)
        for tier in (tiers[-1:] if scaled else tiers)
        if not (scaled and chain == "lookahead")
    )
    for scaled in (False, True):
        centralised = {k.chain for k in kernels if k.centralised and k.scaled == scaled}
        assert centralised >= {"scale+shrink+radam", "scale+shrink+radam+lookahead", "scale+moments"}
    assert all(k.parameter_bytes == TIER_BYTES[k.tier] for k in kernels)


@every_build
def test_nothing_spills_and_registers_stay_in_budget(mix: str, arch: str) -> None:
    kernels = of(mix, arch)
    problems = {str(k): wrong_resources(k, budget(k)) for k in kernels}
    assert not any(problems.values()), report(kernels, problems)


def test_adam_leaves_room_for_more_than_1024_threads() -> None:
    found = {
        mix: {(k.threads, k.in_flight(2)) for k in of(mix, "sm_90") if k.chain == "scale+shrink+adam" and not k.scaled}
        for mix in MAIN
    }
    assert found == {"f32": {(1280, 80.0)}, "bf16_f32": {(1280, 60.0)}, "bf16": {(1152, 72.0)}}


@every_build
def test_loops_move_vectors(mix: str, arch: str) -> None:
    if mix.startswith("any_"):
        pytest.skip("kernels for any storage and alignment take one element at a time")
    kernels = of(mix, arch)
    problems = {str(k): wrong_accesses(k, slots(k.chain)) for k in kernels}
    assert not any(problems.values()), report(kernels, problems)


@every_build
def test_arithmetic_is_ieee_and_not_contracted(mix: str, arch: str) -> None:
    kernels = of(mix, arch)
    problems = {str(k): wrong_arithmetic(k) for k in kernels}
    assert not any(problems.values()), report(kernels, problems)


def test_the_drivers_own_kernels_do_not_spill() -> None:
    """Those that sum long slices and make rows. (A row is indexed by number, so it needs a stack.)"""
    of("f32", ARCHS[-1])
    script = cuda_listing.build_script()
    logs = list(script.build_folder(script.Torch.find()).glob("cuda_driver.*.o.log"))  # type: ignore[union-attr]
    spills = re.findall(r"(\d+) bytes spill stores", "\n".join(log.read_text() for log in logs))
    assert len(spills) >= 6
    assert set(spills) == {"0"}


def test_no_symbol_of_the_cuda_runtime_is_shared() -> None:
    """torch brings a runtime of its own into the process; ours is linked in and hidden."""
    module = native.extension()
    if module is None or not module.has_cuda():
        pytest.skip("the extension was built without CUDA kernels")
    symbols = subprocess.run(["nm", "-D", module.__file__], capture_output=True, text=True, check=True).stdout
    assert "PyInit__C" in symbols
    assert not re.findall(r"\bcu(?:da)?[A-Z]\w+", symbols)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_reason_is_given() -> None:
    module = native.extension()
    if module is None or not module.has_cuda():
        pytest.skip("the extension was built without CUDA kernels")
    assert re.search(r"no NVIDIA driver|no GPU is visible", module.cuda_why_not(0))


FEW = """
#include "chains.h"
namespace fastopt {
using Few = List<Chain<scale, shrink, adam>>;
}
#define Chains Few
#include <cuda_runtime.h>
#include FASTOPT_FAULT
#include "cuda_kernels.cu"
"""


def build_bad(folder: Path, *flags: str, fault: str = "") -> Kernel:
    """Adam in fp32 for sm_90, compiled as the build does, but for some flags or a fault in the source."""
    script = cuda_listing.build_script()
    nvcc = script and script.find_nvcc()
    if not nvcc:
        pytest.skip("there is no nvcc")
    (folder / "few.cu").write_text(FEW)
    (folder / "fault.h").write_text(fault)
    command = [nvcc, *script.NVCC_FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_90,code=sm_90"]
    defines = ["-DFASTOPT_MIX=f32", '-DFASTOPT_FAULT="fault.h"', f"-I{folder}"]
    run = subprocess.run(
        [*command, *defines, "--keep", "--keep-dir", str(folder), "-cubin", "-o", str(folder / "few.o"), "few.cu"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    kernels = kernels_of(run.stdout + run.stderr, [(folder / "few.ptx").read_text()])
    return next(kernel for kernel in kernels if kernel.tier == 0 and not kernel.scaled)


def test_the_checks_have_nothing_against_the_same_kernel_without_a_fault(tmp_path: Path) -> None:
    kernel = build_bad(tmp_path)
    assert (kernel.chain, kernel.mix, kernel.parameter_bytes) == ("scale+shrink+adam", "f32", TIER_BYTES[0])
    assert not wrong_resources(kernel, 64) + wrong_accesses(kernel, 2) + wrong_arithmetic(kernel)


def test_a_spill_is_seen(tmp_path: Path) -> None:
    fault = (
        "#undef __launch_bounds__\n#define __launch_bounds__(threads, ...) __attribute__((launch_bounds(threads, 16)))"
    )
    kernel = build_bad(tmp_path, fault=fault)
    assert kernel.registers <= 32
    assert any("spilled" in line for line in wrong_resources(kernel, 64))


def test_a_register_too_many_is_seen(tmp_path: Path) -> None:
    kernel = build_bad(tmp_path)
    assert wrong_resources(kernel, kernel.registers - 1)


def test_contraction_is_seen(tmp_path: Path) -> None:
    wrong = wrong_arithmetic(build_bad(tmp_path, "-fmad=true"))
    assert any("may be contracted" in line for line in wrong)


@pytest.mark.parametrize("flag", ["-prec-div=false", "-prec-sqrt=false", "-ftz=true"])
def test_approximations_are_seen(tmp_path: Path, flag: str) -> None:
    assert any("not IEEE" in line for line in wrong_arithmetic(build_bad(tmp_path, flag)))


@pytest.mark.parametrize("stream", ["st.global.v4.u32", "ld.global.v4.u32"])
def test_a_narrow_access_is_seen(tmp_path: Path, stream: str) -> None:
    """One access of the loop, cut to four scalar ones."""
    kernel = build_bad(tmp_path)
    loop, *_ = (loop for loop in cuda_listing.loops(kernel.ptx) if any("st.global.v4" in line for line in loop))
    at = next(kernel.ptx.index(line) for line in reversed(loop) if line.startswith(stream))
    scalar = re.sub(r"v4\.", "", re.sub(r"\{(%\w+),.*?\}", r"\1", kernel.ptx[at]))
    cut = dataclasses.replace(kernel, ptx=(*kernel.ptx[:at], scalar, *kernel.ptx[at + 1 :]))
    wrong = wrong_accesses(cut, 2)
    assert any("less than a vector" in line for line in wrong)
    assert any("loads and stores vectors" in line for line in wrong)


def test_a_second_loop_of_scalars_is_seen(tmp_path: Path) -> None:
    kernel = build_bad(tmp_path)
    ends = [loop for loop in cuda_listing.loops(kernel.ptx) if not any(".v4." in line for line in loop)]
    (end,) = (loop for loop in ends if any(line.startswith("st.") for line in loop))
    again = tuple(line.replace("$L", "$M") for line in end)
    wrong = wrong_accesses(dataclasses.replace(kernel, ptx=(*kernel.ptx, *again)), 2)
    assert any("beside" in line for line in wrong)


@every_build
def test_a_loop_of_scalars_is_seen(mix: str, arch: str) -> None:
    if not mix.startswith("any_"):
        pytest.skip("the kernels for any storage serve as the bad example")
    for kernel in of(mix, arch):
        taken_for_dense = dataclasses.replace(kernel, mix=mix.removeprefix("any_"))
        assert wrong_accesses(taken_for_dense, slots(kernel.chain)), kernel


def table() -> str:
    """Every kernel of the larger parameters: registers, resident threads of a multiprocessor, KB of loads under way."""
    lines = [f"{'chain':45} {'mix':9} {'arch':7} registers threads KB"]
    for k in sorted(compiled(), key=lambda k: (k.arch, k.mix, k.centralised, k.chain)):
        if k.tier == 1 and not k.scaled:
            name = k.chain.removeprefix("scale+") + ", centralised" * k.centralised
            flight = k.in_flight(slots(k.chain))
            lines.append(f"{name:45} {k.mix:9} {k.arch:7} {k.registers:9} {k.threads:7} {flight:.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
