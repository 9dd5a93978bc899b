"""Builds fastopt and, where torch, ninja and a C++20 compiler are at hand, its extension ``fastopt._C``.

The project's metadata is in pyproject.toml. This file writes one ninja file and runs it. torch.utils.cpp_extension is
not used because it has no flags per file, refuses CUDA sources on a CPU build of torch, and must import torch, which
costs seconds in every hook that pip calls.

Environment:
  FASTOPT_EXT         auto (default): build the extension if possible, else install without it; 1: fail if it cannot be
                      built; 0: install without it
  FASTOPT_CUDA        auto (default): CUDA kernels if there is nvcc and a GPU; 1: fail if they cannot be built; 0: none
  FASTOPT_CUDA_ARCHS  for which GPUs, e.g. "90" or "80;90;100+PTX" (default: those present; if there is none and
                      FASTOPT_CUDA=1, 80;90;100+PTX). Asking for some asks for CUDA kernels.
  FASTOPT_CUDA_MIXES  for which storage (names of Mix in csrc/mix.h), e.g. "f32;bf16"; any_f32 and any_f64, which
                      take whatever has no kernels of its own, are always built (default: all)
  FASTOPT_EMULATOR    1: also the CUDA kernels' source as CPU code, for tests (default 0)
  FASTOPT_SANITIZE    sanitizers to compile the C++ with, as -fsanitize spells them, e.g. "address,undefined"; see
                      `make sanitize` for how to run the result (default: none)
  CUDA_HOME           the CUDA toolkit (default: that of the nvcc on PATH)
  CXX                 the C++ compiler (default g++)
  MAX_JOBS            how many compilers may run at once (default: ninja's choice)
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# pip builds in an isolated environment without torch; the environment that asked for the build comes last in line.
sys.path.append(sysconfig.get_path("purelib"))

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX = shlex.split(os.environ.get("CXX") or "g++")

# -ffp-contract=off is part of the numbers contract: a fused multiply-add happens where the source writes fma, nowhere
# else. The other two -fno flags let GCC vectorise sqrt and selects; they change no result.
COMMON_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",  # a loop has them for both compilers
)

# A report is an error, and says in which line.
SANITIZE = os.environ.get("FASTOPT_SANITIZE") or ""
SANITIZE_FLAGS = (f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-O1", "-g1") if SANITIZE else ()

# -fmad=false is what -ffp-contract=off is above; division and square root are rounded correctly by default.
NVCC_FLAGS = ("-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")
ALL_ARCHS = "80;90;100+PTX"
OLDEST_ARCH = 80  # bfloat16 arithmetic, and what anything older would need was never tested

# The kernels' source is compiled once for each of these; the driver picks one at run time.
BASELINE: dict[str, tuple[str, ...]] = {"baseline": ()}
X86_INSTRUCTION_SETS = BASELINE | {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ),
}


def setting(name: str) -> str:
    """The value of a three-way environment variable: auto, 0 or 1."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value!r}: accepted are auto, 0 and 1")
    return value


@dataclass(frozen=True)
class Torch:
    """What the build needs to know of the installed torch, read from its files without importing it."""

    root: Path
    version: str

    @classmethod
    def find(cls) -> Torch | None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        root = Path(spec.origin).parent
        found = re.search(r"^__version__ = '([^']+)'", (root / "version.py").read_text(), re.MULTILINE)
        return cls(root, found[1]) if found else None

    def include_flags(self) -> list[str]:
        include = self.root / "include"
        return [f"-isystem{d}" for d in (include, include / "torch/csrc/api/include", sysconfig.get_path("include"))]

    def link_flags(self) -> list[str]:
        """torch's libraries, and the very OpenMP runtime torch brings: a second one in the process would have threads
        and a thread count of its own, which ``torch.set_num_threads`` does not reach."""
        bundled = [*(self.root / "lib").glob("libgomp*.so*"), *(self.root.parent / "torch.libs").glob("libgomp*.so*")]
        openmp = str(bundled[0]) if bundled else "-lgomp"
        return [f"-L{self.root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", openmp]


@dataclass(frozen=True)
class Cuda:
    """Which CUDA kernels are built, and by what."""

    nvcc: str
    archs: tuple[str, ...]
    mixes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Part of the objects' names, so that builds for other GPUs lie side by side."""
        return "sm_" + "-".join(self.archs)

    def arch_flags(self) -> Iterator[str]:
        for arch in self.archs:
            number = arch.removesuffix("+PTX")
            code = f"[sm_{number},compute_{number}]" if arch != number else f"sm_{number}"
            yield f"-gencode=arch=compute_{number},code={code}"

    def link_flags(self) -> list[str]:
        """The static runtime, so no second libcudart beside torch's. Where it is, nvcc says: it may be a wrapper."""
        said = subprocess.run([self.nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        found = re.search(r"^#\$ LIBRARIES=(.*)$", said, re.MULTILINE)
        folders = shlex.split(found[1]) if found else []
        return [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]


def listed(name: str) -> list[str]:
    """The words of an environment variable that holds a list."""
    return [word for word in re.split(r"[;, ]+", os.environ.get(name, "")) if word]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (
        (home and shutil.which("nvcc", path=f"{home}/bin"))
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def said_by(command: list[str]) -> str:
    """The standard output of a command; nothing if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def gpus() -> list[str]:
    """The architectures of the GPUs present."""
    said = said_by(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return sorted({found.replace(".", "") for found in re.findall(r"^\d+\.\d$", said, re.MULTILINE)}, key=int)


def known_archs(nvcc: str) -> list[str]:
    return re.findall(r"compute_(\w+)", said_by([nvcc, "--list-gpu-arch"]))


def all_mixes() -> list[str]:
    found = re.search(r"enum class Mix : int8_t \{([^}]*)\}", (CSRC / "mix.h").read_text())
    assert found, "csrc/mix.h: no enum Mix"
    return re.findall(r"\w+", found[1])


def chosen_mixes() -> tuple[str, ...]:
    asked = listed("FASTOPT_CUDA_MIXES") or all_mixes()
    if unknown := set(asked) - set(all_mixes()):
        raise SystemExit(
            f"FASTOPT_CUDA_MIXES: unknown {', '.join(sorted(unknown))}; known are {', '.join(all_mixes())}"
        )
    return tuple(mix for mix in all_mixes() if mix in asked or mix.startswith("any_"))


def chosen_archs(nvcc: str) -> list[str]:
    here = gpus()
    archs = [arch.replace(".", "") for arch in listed("FASTOPT_CUDA_ARCHS")] or [
        a for a in here if int(a) >= OLDEST_ARCH
    ]
    if here and not archs:
        raise CompileError(f"the GPUs here are sm_{', sm_'.join(here)}; kernels are for sm_{OLDEST_ARCH} and later")
    if setting("FASTOPT_CUDA") == "1":
        archs = archs or ALL_ARCHS.split(";")
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}(\+PTX)?", arch):
            raise SystemExit(f"FASTOPT_CUDA_ARCHS: {arch!r} is none; accepted are lists such as {ALL_ARCHS}")
        if int(arch.removesuffix("+PTX")) < OLDEST_ARCH:
            raise SystemExit(f"FASTOPT_CUDA_ARCHS: {arch!r} is too old; kernels are for {OLDEST_ARCH} and later")
    known = known_archs(nvcc)
    if unknown := [arch for arch in archs if arch.removesuffix("+PTX") not in known]:
        raise CompileError(f"{nvcc} cannot compile for sm_{', sm_'.join(unknown)}, only for {', '.join(known)}")
    return archs


@cache
def cuda() -> Cuda | None:
    """What of CUDA to build; None and a word about it if nothing."""
    wanted, nvcc = setting("FASTOPT_CUDA"), find_nvcc()
    asked = wanted == "1" or (wanted == "auto" and bool(listed("FASTOPT_CUDA_ARCHS")))
    if wanted == "0":
        return None
    try:
        if nvcc is None:
            raise CompileError("there is no nvcc: set CUDA_HOME or install the CUDA toolkit")
        if archs := chosen_archs(nvcc):
            return Cuda(nvcc, tuple(archs), chosen_mixes())
        reason = "there is no GPU here (FASTOPT_CUDA=1 or FASTOPT_CUDA_ARCHS builds CUDA kernels all the same)"
    except CompileError as error:
        if asked:
            raise SystemExit(f"CUDA kernels were asked for, but {error}") from error
        reason = str(error)
    print(f"fastopt: CPU kernels only, {reason}", file=sys.stderr, flush=True)
    return None


@dataclass(frozen=True)
class Unit:
    """One object file: what it is compiled from, by which ninja rule, with which flags beside the common ones."""

    source: Path
    flags: tuple[str, ...] = ()
    suffix: str = ""
    rule: str = "cxx"

    @property
    def object(self) -> str:
        return f"{self.source.stem}{self.suffix}.o"


def instruction_sets() -> dict[str, tuple[str, ...]]:
    return X86_INSTRUCTION_SETS if sysconfig.get_platform().endswith("-x86_64") else BASELINE


def cpu_kernel_units() -> Iterator[Unit]:
    """No include path: a kernel sees neither torch nor Python, hence compiles in a second or two."""
    for isa, flags in instruction_sets().items():
        flags = (f"-DFASTOPT_ISA={isa}", "-fno-semantic-interposition", *flags)
        yield Unit(CSRC / "cpu_kernels.cpp", flags, f".{isa}")


def cuda_units(cuda: Cuda) -> Iterator[Unit]:
    """One for each mix, so that they compile side by side; torch is not seen here either."""
    archs = tuple(cuda.arch_flags())
    for mix in cuda.mixes:
        yield Unit(CSRC / "cuda_kernels.cu", (*archs, f"-DFASTOPT_MIX={mix}"), f".{mix}.{cuda.name}", "nvcc")
    built = (f'-DFASTOPT_CUDA_ARCHS="{";".join(cuda.archs)}"', f'-DFASTOPT_CUDA_MIXES="{" ".join(cuda.mixes)}"')
    yield Unit(CSRC / "cuda_driver.cu", (*archs, *built), f".{cuda.name}", "nvcc")


def emulator_units() -> Iterator[Unit]:
    """-O1: they are slow anyway, and compile in half the time."""
    flags = ("-O1",)
    for mix in all_mixes():
        yield Unit(CSRC / "emulator_kernels.cpp", (*flags, f"-DFASTOPT_MIX={mix}"), f".{mix}")
    yield Unit(CSRC / "emulator.cpp", flags)


def host_units(torch: Torch) -> Iterator[Unit]:
    shared = (f'-DFASTOPT_TORCH_VERSION="{torch.version}"', *torch.include_flags())
    if len(instruction_sets()) > 1:
        shared = ("-DFASTOPT_X86_KERNELS", *shared)
    flags = {"crew.cpp": ("-DAT_PARALLEL_OPENMP=1",)}
    for source in sorted(CSRC.glob("*.cpp")):
        if source.stem not in ("absent_drivers", "cpu_kernels", "emulator", "emulator_kernels"):
            yield Unit(source, (*flags.get(source.name, ()), *shared))


def units(torch: Torch) -> Iterator[Unit]:
    """Every object of the extension. What a build includes decides which objects are linked, and the one that stands in
    for the drivers it leaves out; the others are the same in every build."""
    yield from host_units(torch)
    yield from cpu_kernel_units()
    emulated = setting("FASTOPT_EMULATOR") == "1"
    if built := cuda():
        yield from cuda_units(built)
    if emulated:
        yield from emulator_units()
    present = [name for name, there in (("CUDA", built), ("EMULATOR", emulated)) if there]
    suffix = "".join(f".{name.lower()}" for name in present)
    yield Unit(CSRC / "absent_drivers.cpp", tuple(f"-DFASTOPT_WITH_{name}" for name in present), suffix)


def shell(words: Iterable[object]) -> str:
    return shlex.join(map(str, words)).replace("$", "$$")


def path(value: object) -> str:
    """A path as ninja wants it in a build line."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_text(library: str, torch: Torch) -> str:
    compile_command = (
        f"{shell(CXX)} {shell((*COMMON_FLAGS, *SANITIZE_FLAGS, f'-I{CSRC}'))} $flags -MMD -MF $out.d -c $in -o $out"
    )
    cuda_libraries = cuda().link_flags() if cuda() else []
    link_flags = shell(SANITIZE_FLAGS or ("-Wl,-s",))
    link_command = f"{shell(CXX)} -shared {link_flags} $in -o $out {shell([*torch.link_flags(), *cuda_libraries])}"
    text = [
        f"rule cxx\n  command = {compile_command}\n  depfile = $out.d\n  deps = gcc\n  description = CXX $out",
        *nvcc_rule(),
        f"rule link\n  command = {link_command}\n  description = LINK $out",
    ]
    objects = []
    for unit in units(torch):
        text.append(f"build {unit.object}: {unit.rule} {path(unit.source)}\n  flags = {shell(unit.flags)}")
        objects.append(unit.object)
    text.append(f"build {path(library)}: link {' '.join(objects)}")
    return "\n".join(text) + "\n"


def nvcc_rule() -> Iterator[str]:
    """What ptxas says and the PTX are kept beside the object, for the tests that read them."""
    if not (built := cuda()):
        return
    # nvcc finds the host compiler on PATH; one that was chosen, it must be told of.
    host = ["-ccbin", CXX[-1]] if os.environ.get("CXX") and not os.environ.get("NVCC_CCBIN") else []
    compile_command = shell((built.nvcc, *host, *NVCC_FLAGS, f"-I{CSRC}"))
    yield (
        "rule nvcc\n  command = rm -rf $out.kept && mkdir $out.kept && "
        f"{compile_command} $flags --keep --keep-dir $out.kept -MD -MF $out.d -c $in -o $out >$out.log 2>&1 "
        "&& find $out.kept -type f ! -name '*.ptx' -delete || { cat $out.log; false; }\n"
        "  depfile = $out.d\n  deps = gcc\n  description = NVCC $out"
    )


def find_ninja() -> str | None:
    """The ninja of the wheel, for an environment that is not activated; else that on PATH, where pip's isolated builds
    have it: there the wheel of newer versions does not know its own folder (BIN_DIR is empty)."""
    with contextlib.suppress(ImportError):
        if found := shutil.which("ninja", path=importlib.import_module("ninja").BIN_DIR):
            return found
    return shutil.which("ninja")


def build_folder(torch: Torch) -> Path:
    """Not build_ext's build_temp: an editable build's is a new random folder each time, and nothing would be reused."""
    suffix = f"-{SANITIZE.replace(',', '-')}" if SANITIZE else ""
    return ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-torch{torch.version}{suffix}"


class NinjaBuild(build_ext):
    """Compiles the one extension with ninja, in a folder that survives between builds."""

    def run(self) -> None:
        self.into_source_tree = bool(self.inplace)  # true of editable builds too; setuptools clears it while it runs
        super().run()

    def build_extension(self, ext: Extension) -> None:
        torch, ninja = Torch.find(), find_ninja()
        if torch is None or ninja is None:
            raise CompileError(reason_against())
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = build_folder(torch)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_text(library.name, torch))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run([ninja, *jobs], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.remove_stale(library)
            say(f"the extension did NOT build: {error}")
            raise CompileError(str(error)) from error
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / library.name, library)

    def remove_stale(self, library: Path) -> None:
        """A failed build must not leave an older library to be picked up in place of the one that was asked for."""
        library.unlink(missing_ok=True)
        if self.into_source_tree:
            (ROOT / "fastopt" / library.name).unlink(missing_ok=True)


def say(message: str) -> None:
    print(f"\n*** fastopt: {message}\n", file=sys.stderr, flush=True)


def reason_against() -> str:
    """Why the extension cannot be built here; empty if nothing is known against it."""
    if setting("FASTOPT_EXT") == "0":
        return "FASTOPT_EXT=0"
    if not sys.platform.startswith("linux"):
        return f"the extension builds on Linux only, this is {sys.platform}"
    if Torch.find() is None:
        return "torch is not installed in this environment: install torch first, then fastopt"
    if shutil.which(CXX[0]) is None:
        return f"no C++ compiler {CXX[0]!r} on PATH: install g++ or set CXX"
    if find_ninja() is None:
        return "no ninja: pip install ninja"
    return ""


def main() -> None:
    required = setting("FASTOPT_EXT") == "1"
    reason = reason_against()
    if reason and required:
        raise SystemExit(f"FASTOPT_EXT=1, but {reason}")
    if reason:
        say(f"installing WITHOUT the compiled extension: {reason}")
    # Decided before setup(): without extension modules the wheel is honestly tagged py3-none-any.
    sources = sorted(str(source.relative_to(ROOT)) for source in CSRC.glob("*.c*"))
    extension = Extension("fastopt._C", sources, optional=not required)
    setup(ext_modules=[] if reason else [extension], cmdclass={"build_ext": NinjaBuild})


if __name__ == "__main__":
    main()
