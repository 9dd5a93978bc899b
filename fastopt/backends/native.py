"""The compiled extension: CPU kernels of every chain, and the Plan that drives them."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastopt.chain import Chain

_REBUILD = "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps fastopt` (or `make build`)"


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or why there is none; one built for another torch may crash, so its stamp is read first."""
    spec = importlib.util.find_spec("fastopt._C")
    if spec is None or spec.origin is None:
        return None, (
            "the compiled extension is not installed (it needs torch, ninja and a C++20 compiler at install time): "
            "install a compiler, then " + _REBUILD
        )
    built_for = _stamp(spec.origin)
    if built_for not in (None, torch.__version__):
        reason = f"the extension was built for torch {built_for}, this is torch {torch.__version__}: {_REBUILD}"
        warnings.warn(f"fastopt runs without its native backend: {reason}", RuntimeWarning, stacklevel=4)
        return None, reason
    try:
        module = importlib.import_module("fastopt._C")
    except ImportError as error:
        reason = f"the compiled extension does not load ({error}): {_REBUILD}"
        warnings.warn(f"fastopt runs without its native backend: {reason}", RuntimeWarning, stacklevel=4)
        return None, reason
    return module, ""


def _stamp(path: str) -> str | None:
    """The torch version an extension was built for, read from the file without loading it."""
    mark = b"fastopt built for torch "
    _, found, rest = Path(path).read_bytes().partition(mark)
    return rest.partition(b"\0")[0].decode() if found else None


def extension() -> ModuleType | None:
    return _load()[0]


def why_not(device: str = "cpu") -> str:
    if device != "cpu":
        return f"the native backend has no {device} kernels in this version"
    return _load()[1]


@cache
def _indices() -> dict[str, int]:
    module = extension()
    return {} if module is None else {name: index for index, name in enumerate(module.chain_names())}


def chain_index(chain: Chain) -> int:
    """The compiled kernel of a chain."""
    try:
        return _indices()[chain.name]
    except KeyError:
        raise RuntimeError(
            f"the chain {chain.name} is not compiled into fastopt._C: add its rule to csrc/chains.h and rebuild"
        ) from None


def advise_huge_pages(t: Tensor) -> None:
    """Ask for huge pages behind a tensor that was allocated but not yet written to."""
    module = extension()
    if module is not None and t.layout == torch.strided:
        module.advise_huge_pages(t.data_ptr(), t.untyped_storage().nbytes())


def make_plan(hyper: tuple[str, ...], counters: tuple[str, ...], ignored: tuple[str, ...], intern: Any) -> Any:
    module = extension()
    assert module is not None, why_not()
    return module.Plan(hyper, counters, ignored, intern)
