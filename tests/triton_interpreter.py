"""Triton's interpreter, with IEEE arithmetic where a GPU has it.

Import this before Triton. The interpreter of Triton 3.6 rounds twice in `fma` (3.9 does not), truncates when it narrows
float32 to bfloat16, loses subnormals when it widens, cannot use a number as the bound of a loop under numpy 2.4, and
has neither power nor remainder of float64 (here they are libm's, as Python's);
here those operations get the meaning that they have in the compiled kernels (test_triton_compiled.py reads it from
their PTX: fma.rn, cvt.rn). Nothing of ours is replaced, but launches are made small, so that small tensors have chunks,
tails and long slices.

What it does again and again is remembered, and 32-bit integers are not watched for overflow (of what has hundreds of
elements nothing overflows; test_triton.py and test_device_plan.py look at offsets beyond): two thirds of the time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime import interpreter

from fastopt.backends.reference import exact_fma
from fastopt.backends.triton import compiled, tables

compiled.ENABLED = os.environ.get("FASTOPT_TEST_PLAN") != "python"


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    values = (torch.from_numpy(np.ascontiguousarray(v)) for v in np.broadcast_arrays(x.data, y.data, z.data))
    return interpreter.TensorHandle(exact_fma(*values).numpy(), z.dtype.scalar)


def _cast(self: Any, value: Any, to: Any) -> Any:
    types = value.dtype.scalar, to.scalar
    if types not in ((tl.float32, tl.bfloat16), (tl.bfloat16, tl.float32)):
        return _interpreted_cast(self, value, to)
    data = torch.from_numpy(np.ascontiguousarray(value.data))
    if types[0] == tl.bfloat16:
        return interpreter.TensorHandle(data.view(torch.bfloat16).float().numpy(), tl.float32)
    return interpreter.TensorHandle(data.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)


def _of_host(function: Any) -> Any:
    """A function of two float64 in place of CUDA's."""

    def call(x: Any, y: Any, _semantic: Any = None) -> Any:
        a, b = np.broadcast_arrays(x.handle.data, y.handle.data)
        data = np.frompyfunc(lambda u, v: function(float(u), float(v)), 2, 1)(a, b).astype(np.float64)
        return tl.tensor(interpreter.TensorHandle(data, tl.float64), x.type if x.type.is_block() else y.type)

    return call


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _interpreted_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of ours within a kernel, without patching the language again: that takes half the time."""
    if self.fn.__module__.startswith("triton."):  # these see the language under another name
        return _interpreted_call(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


_dtypes: dict[Any, Any] = {}


def _np_dtype(dtype: Any) -> Any:
    kind = dtype.scalar
    if kind.is_ptr():
        return np.dtype(np.uint64)
    if kind not in _dtypes:
        _dtypes[kind] = _interpreted_dtype(kind)
    return _dtypes[kind]


@functools.cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


_interpreted_call = interpreter.InterpretedFunction.__call__
_interpreted_cast = interpreter.InterpreterBuilder.cast_impl
_interpreted_dtype = interpreter._get_np_dtype
_interpreted_tensor = interpreter._patch_lang_tensor
libdevice.pow, libdevice.fmod = _of_host(operator.pow), _of_host(math.fmod)
interpreter.InterpreterBuilder.create_fma = _fma
interpreter.InterpreterBuilder.cast_impl = _cast
interpreter._get_np_dtype = _np_dtype
interpreter._patch_builtin = _patch_builtins
interpreter._patch_lang_tensor = _patch_tensor
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
interpreter.InterpretedFunction.__call__ = _call
tables.TILE = tables.Tile(chunk=64, block=32, warps=1, longest=64)
