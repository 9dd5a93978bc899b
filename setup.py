"""Builds fastopt and, where torch, ninja and a C++20 compiler are at hand, its extension ``fastopt._C``.

The project's metadata is in pyproject.toml. This file writes one ninja file and runs it. torch.utils.cpp_extension is
not used because it has no flags per file, refuses CUDA sources on a CPU build of torch, and must import torch, which
costs seconds in every hook that pip calls.

Environment:
  FASTOPT_EXT   auto (default): build the extension if possible, else install without it; 1: fail if it cannot be
                built; 0: install without it
  FASTOPT_CUDA  auto (default): CUDA kernels where there are CUDA sources; 1: fail without them; 0: none
  CXX           the C++ compiler (default g++)
  MAX_JOBS      how many compilers may run at once (default: ninja's choice)
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
)

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


def units(torch: Torch) -> Iterator[Unit]:
    """Every object of the extension. CUDA units (``csrc/*.cu``, rule "nvcc") will be yielded here as well."""
    kernels = sorted(CSRC.glob("cpu_kernels*.cpp"))
    for source in kernels:
        for isa, flags in instruction_sets().items():
            # No include path: a kernel sees neither torch nor Python, hence compiles in a second or two.
            yield Unit(source, (f"-DFASTOPT_ISA={isa}", "-fno-semantic-interposition", *flags), f".{isa}")

    shared = (f'-DFASTOPT_TORCH_VERSION="{torch.version}"', *torch.include_flags())
    if len(instruction_sets()) > 1:
        shared = ("-DFASTOPT_X86_KERNELS", *shared)
    for source in sorted(set(CSRC.glob("*.cpp")).difference(kernels)):
        openmp = ("-fopenmp", "-DAT_PARALLEL_OPENMP=1") if source.name == "cpu_driver.cpp" else ()
        yield Unit(source, (*openmp, *shared))


def shell(words: Iterable[object]) -> str:
    return shlex.join(map(str, words)).replace("$", "$$")


def path(value: object) -> str:
    """A path as ninja wants it in a build line."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_text(library: str, torch: Torch) -> str:
    compile_command = f"{shell(CXX)} {shell((*COMMON_FLAGS, f'-I{CSRC}'))} $flags -MMD -MF $out.d -c $in -o $out"
    link_command = f"{shell(CXX)} -shared -Wl,-s $in -o $out {shell(torch.link_flags())}"
    text = [
        f"rule cxx\n  command = {compile_command}\n  depfile = $out.d\n  deps = gcc\n  description = CXX $out",
        f"rule link\n  command = {link_command}\n  description = LINK $out",
    ]
    objects = []
    for unit in units(torch):
        text.append(f"build {unit.object}: {unit.rule} {path(unit.source)}\n  flags = {shell(unit.flags)}")
        objects.append(unit.object)
    text.append(f"build {path(library)}: link {' '.join(objects)}")
    return "\n".join(text) + "\n"


def find_ninja() -> str | None:
    """The ninja of the wheel (its folder is on nobody's PATH in an isolated build), else the system's."""
    with contextlib.suppress(ImportError):
        return shutil.which("ninja", path=importlib.import_module("ninja").BIN_DIR)
    return shutil.which("ninja")


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
        # Not self.build_temp: an editable build's is a new random folder each time, and nothing would be reused.
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-torch{torch.version}"
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
    if setting("FASTOPT_CUDA") == "1" and not any(CSRC.glob("*.cu")):
        raise SystemExit("FASTOPT_CUDA=1, but this version of fastopt has no CUDA sources; unset it")
    reason = reason_against()
    if reason and required:
        raise SystemExit(f"FASTOPT_EXT=1, but {reason}")
    if reason:
        say(f"installing WITHOUT the compiled extension: {reason}")
    # Decided before setup(): without extension modules the wheel is honestly tagged py3-none-any.
    sources = sorted(str(source.relative_to(ROOT)) for source in CSRC.glob("*.cpp"))
    extension = Extension("fastopt._C", sources, optional=not required)
    setup(ext_modules=[] if reason else [extension], cmdclass={"build_ext": NinjaBuild})


main()
