"""Coefficient rows made where the step lives: csrc/rows.h and `Setting.device_rows` against `Setting.at`."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import pathlib
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, by_id, parametrize_cases
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from fastopt import rule as rules
from fastopt.chain import Chain
from fastopt.optimizers.sgd import SGDRule
from fastopt.rule import ROW_RULES, DeviceRow, OnDevice, Row, Setting, Settings

CSRC = pathlib.Path(fastopt.__file__).resolve().parents[1] / "csrc"
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 30, 100, 1000, 250_000, 2**24)


class Index(dict[str, int]):
    """Numbers chains as they come, so that nothing here needs the extension."""

    def __call__(self, chain: Chain) -> int:
        return self.setdefault(chain.name, len(self))


def settings_of(case: Case) -> tuple[Settings, dict[str, Any]]:
    """The settings of the engine that runs the case, and its group."""
    optimizer = case.make([torch.zeros(2, 3, requires_grad=True)])
    if isinstance(optimizer, fastopt.Lookahead) and not optimizer.fuses:
        optimizer = optimizer.optimizer
    return Settings(optimizer.engine().rule, Index()), optimizer.param_groups[0]


def setting_of(case: Case, **changed: Any) -> Setting:
    settings, group = settings_of(case)
    return settings.of({**group, **changed})


def carries(setting: Setting, steps: tuple[int, ...], single: bool) -> list[float]:
    """A second counter before each of these steps, as if they were all there are."""
    found, carry = [], 1.0
    for t in steps:
        found.append(carry)
        carry = setting.at(float(t), carry, single, False).carry
    return found


def has_carry(setting: Setting) -> bool:
    return len(setting.rule.counters) > 1


class Scalar(ctypes.Union):
    _fields_ = (("value", ctypes.c_double), ("address", ctypes.c_void_p))


class RowSetting(ctypes.Structure):
    _fields_ = (
        ("hyper", Scalar * 6),
        ("weight_decay", ctypes.c_double),
        ("alpha", ctypes.c_double),
        ("period", ctypes.c_double),
        ("chains", ctypes.c_int16 * 5),
        ("sources", ctypes.c_int8 * 6),
        ("rule", ctypes.c_int8),
        ("decay", ctypes.c_int8),
        ("maximize", ctypes.c_bool),
        ("slow", ctypes.c_bool),
    )

    @classmethod
    def of(cls, given: OnDevice) -> RowSetting:
        struct = cls()
        for i, value in enumerate(given.hyper):
            if isinstance(value, Tensor):
                struct.hyper[i].address = value.data_ptr()
                struct.sources[i] = {torch.float32: 1, torch.float64: 2}[value.dtype]
            else:
                struct.hyper[i].value = value
        struct.chains[:] = given.chains
        for name in ("weight_decay", "alpha", "period", "rule", "decay", "maximize", "slow"):
            setattr(struct, name, getattr(given, name))
        return struct


class RowResult(ctypes.Structure):
    _fields_ = (
        ("c", ctypes.c_double * 16),
        ("carry", ctypes.c_double),
        ("count", ctypes.c_int32),
        ("chain", ctypes.c_int16),
        ("way", ctypes.c_int8),
    )


SHIM = """
#include "rows.h"
using namespace fastopt;
extern "C" {
int rule_count() { return RowRules::size; }
const char* rule_name(int i) { return RowRules::names[i]; }
const char* rule_hyper(int i) { return RowRules::hyper[i]; }
int setting_size() { return sizeof(RowSetting); }
int result_size() { return sizeof(RowResult); }
void make_row(const RowSetting* s, double t, double carry, bool single, bool asked, RowResult* out) {
  *out = row_of(*s, t, carry, single, asked);
}
}
"""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if not (CSRC / "rows.h").is_file():
        pytest.skip("an installed package without its C++ sources")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++20 compiler; {compiler[0]} is not installed")
    folder = tmp_path_factory.mktemp("rows")
    source, library = folder / "rows.cpp", folder / "rows.so"
    source.write_text(SHIM, encoding="utf-8")
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra"]
    command = [*compiler, *flags, "-Werror", "-shared", "-fPIC", f"-I{CSRC}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    rows = ctypes.CDLL(str(library))
    rows.rule_name.restype = rows.rule_hyper.restype = ctypes.c_char_p
    assert rows.setting_size() == ctypes.sizeof(RowSetting)
    assert rows.result_size() == ctypes.sizeof(RowResult)
    return rows


def compiled_row(rows: ctypes.CDLL, setting: Setting, t: float, carry: float, single: bool, asked: bool) -> Any:
    given = setting.on_device()
    assert given is not None
    result = RowResult()
    arguments = ctypes.c_double(t), ctypes.c_double(carry), ctypes.c_bool(single), ctypes.c_bool(asked)
    rows.make_row(ctypes.byref(RowSetting.of(given)), *arguments, ctypes.byref(result))
    return result


def bits(values: Any) -> list[str]:
    """Doubles so that equal means identical, signs of zeros included."""
    return [float(value).hex() for value in values]


def check_compiled(rows: ctypes.CDLL, setting: Setting, t: float, carry: float, single: bool, asked: bool) -> None:
    got, want = compiled_row(rows, setting, t, carry, single, asked), setting.at(t, carry, single, asked)
    assert bits(got.c[: got.count]) == bits(want.coefficients), (t, want.chain.name)
    assert got.count == len(want.chain.coefficients)
    assert bits([got.carry]) == bits([want.carry])
    assert got.chain == setting.row(t, carry, single, asked)[0]


@parametrize_cases()
def test_compiled_rows_are_pythons_bit_for_bit(case: Case, compiled: ctypes.CDLL) -> None:
    setting = setting_of(case)
    for single in (True, False):
        for t, carry in zip(STEPS, carries(setting, STEPS, single), strict=True):
            for asked in (False, True):
                check_compiled(compiled, setting, float(t), carry, single, asked)


@pytest.mark.parametrize("case", by_id("adam", "radam", "nadam", "nadam-psi2", "lookahead-nadam"), ids=lambda c: c.id)
def test_compiled_rows_follow_every_step(case: Case, compiled: ctypes.CDLL) -> None:
    """NAdam's product of mu is carried along. One in a thousand of libm's powers of 1/2 is not the nearest root."""
    setting = setting_of(case)
    for single in (True, False):
        carry = 1.0
        for t in range(1, 3000):
            check_compiled(compiled, setting, float(t), carry, single, False)
            carry = setting.at(float(t), carry, single, False).carry


@pytest.mark.parametrize("case", [c for c in CASES if c.lookahead and c.name != "Ranger"], ids=lambda c: c.id)
def test_compiled_row_of_a_parameter_without_gradient_pulls_it_back(case: Case, compiled: ctypes.CDLL) -> None:
    check_compiled(compiled, setting_of(case), 0.0, 0.75, True, True)


def test_compiled_rules_have_pythons_names_and_order(compiled: ctypes.CDLL) -> None:
    assert [compiled.rule_name(i).decode() for i in range(compiled.rule_count())] == list(ROW_RULES)
    used = set()
    for case in CASES:
        setting = setting_of(case)
        twin = setting.rule.twin(setting.h)
        assert twin is not None, f"{case.id} has no compiled row"
        name, hyper = twin
        assert compiled.rule_hyper(ROW_RULES.index(name)).decode().split() == list(hyper)
        used.add(name)
    assert used == set(ROW_RULES)


def test_a_rule_without_a_compiled_row_says_so() -> None:
    class Plain(SGDRule):
        def twin(self, h: Any) -> None:
            return None

    _, group = settings_of(by_id("sgd")[0])
    assert Settings(Plain(), Index()).of(group).on_device() is None


@pytest.fixture
def _symbolic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats CPU tensors as if they lived on a device."""
    monkeypatch.setattr(rules, "stays", lambda tensor, group: True)


def on_tensors(case: Case) -> tuple[Settings, dict[str, Any], list[Tensor]]:
    """The case with lr, and its betas if it has any, as tensors."""
    settings, group = settings_of(case)
    lr = torch.tensor(group["lr"], dtype=torch.float32)
    betas = [torch.tensor(beta, dtype=torch.float64) for beta in group.get("betas", ())]
    return settings, group | {"lr": lr} | ({"betas": tuple(betas)} if betas else {}), [lr, *betas]


@pytest.mark.usefixtures("_symbolic")
@parametrize_cases()
def test_hyper_parameters_on_a_device_are_read_at_every_step(case: Case, compiled: ctypes.CDLL) -> None:
    settings, group, tensors = on_tensors(case)
    setting = settings.of(group)
    assert setting.symbolic
    for round_ in range(2):
        plain = settings.of(group | {"lr": tensors[0].item(), "betas": tuple(t.item() for t in tensors[1:])})
        for t, carry in zip(STEPS, carries(plain, STEPS, True), strict=True):
            want = plain.at(float(t), carry, True, True)
            assert setting.at(float(t), carry, True, True) == want
            got = compiled_row(compiled, setting, float(t), carry, True, True)
            assert bits(got.c[: got.count]) == bits(want.coefficients)
        check_tensors(setting, plain, True)
        for tensor in tensors:
            tensor.mul_(0.75)
        assert settings.of(group) is setting, f"the same tensors are the same setting, in round {round_}"
    assert settings.of(group | {"lr": tensors[0].clone()}) is not setting


def test_only_tensors_on_a_device_in_groups_that_step_there_stay() -> None:
    settings, group = settings_of(by_id("adam")[0])
    with FakeTensorMode():
        on_device, double, half = (
            torch.empty((), dtype=dtype, device="cuda") for dtype in (torch.float32, torch.float64, torch.float16)
        )
    for flags in ({"capturable": True}, {"fused": True}):
        assert settings.of({**group, **flags, "lr": on_device}).symbolic
        assert settings.of({**group, **flags, "betas": (on_device, double)}).symbolic
        assert not settings.of({**group, **flags, "lr": torch.tensor(0.5)}).symbolic
        assert not rules.stays(half, flags)
    assert not rules.stays(on_device, {"capturable": False, "fused": None})


class Shaken(float):
    """A step t whose powers come out so many ulps away from libm's, those of t + 1 so many."""

    def __new__(cls, value: float, now: int, after: int) -> Shaken:  # noqa: PYI034 typing.Self is newer than 3.10
        return super().__new__(cls, value)

    def __init__(self, value: float, now: int, after: int) -> None:
        self.now, self.after = now, after

    def __add__(self, other: float) -> Shaken:
        return Shaken(float(self) + other, self.after, self.after)

    def __mul__(self, other: float) -> Shaken:
        return Shaken(float(self) * other, self.now, self.after)

    def __rmul__(self, other: float) -> Shaken:
        return Shaken(other * float(self), self.now, self.after)

    def __rpow__(self, base: float, mod: None = None) -> float:
        x = base ** float(self)
        for _ in range(abs(self.now)):
            x = math.nextafter(x, math.inf if self.now > 0 else 0.0)
        return x


def one_ulp_apart(a: float, b: float) -> bool:
    return a == b or math.nextafter(a, b) == b


def near(got: float, rows: list[Row], i: int) -> bool:
    """Whether a coefficient is one that powers within reach of libm's lead to; a last root may be one ulp off.

    torch takes x**0.5 as the correctly rounded root, libm's pow is within an ulp of it.
    """
    return any(one_ulp_apart(got, row.coefficients[i]) for row in rows)


def check_tensors(setting: Setting, plain: Setting, asked: Any, device: str = "cpu", reach: int = 1) -> None:
    """`setting.device_rows` at all steps at once against `plain.at` one by one.

    torch's vectorised pow and libm's are each within 1 ulp of the exact power, so they are at most one number apart,
    `reach`, which is 2 for CUDA's pow, documented to be within 2 ulp. Everything after the powers is the same IEEE
    arithmetic: a coefficient must be, but for a last root, exactly what one of those powers gives.
    """
    single = True
    before = carries(plain, STEPS, single)
    t = torch.tensor([0, *STEPS], dtype=torch.float64, device=device)
    carry = torch.tensor([0.75, *before], dtype=torch.float64, device=device) if has_carry(plain) else None
    rows, carried = setting.device_rows(t, carry, single, asked)
    flags = [bool(a) for a in asked] if isinstance(asked, Tensor) else [asked] * len(t)
    if pulls := [row for row in rows if row.chain is rules.PULL]:
        assert [row.active.tolist() for row in pulls] == [[flags[0], *[False] * len(STEPS)]]
        assert (pulls[0].first_slot, tuple(pulls[0].coefficients[0].tolist())) == plain.row(0.0, 0.0, single, True)[
            1:4:2
        ]
    for i, step in enumerate(STEPS, start=1):
        want = plain.at(float(step), before[i - 1], single, flags[i])
        shifts = itertools.product(range(-reach, reach + 1), repeat=2)
        shaken = [plain.at(Shaken(step, *shift), before[i - 1], single, flags[i]) for shift in shifts]
        (row,) = (row for row in rows if row.active[i])
        assert row.chain is want.chain
        assert row.first_slot == plain.row(float(step), before[i - 1], single, flags[i])[1]
        got = row.coefficients[i].tolist()
        assert len(got) == len(want.coefficients)
        for k, value in enumerate(got):
            assert near(value, shaken, k), (step, want.chain.coefficients[k], value, want.coefficients[k])
        if carried is not None:
            assert carried[i].item() in {row.carry for row in shaken}
    if carried is not None:
        assert carried[0].item() == 0.75, "a step of 0 leaves the second counter alone"


def asked_ways() -> Iterator[Any]:
    yield False
    yield True
    yield torch.tensor([i % 2 == 0 for i in range(len(STEPS) + 1)])


@parametrize_cases()
def test_rows_of_tensors_are_the_rows_of_numbers(case: Case) -> None:
    setting = setting_of(case)
    for asked in asked_ways():
        check_tensors(setting, setting, asked)


def test_rows_of_tensors_differ_where_the_steps_do() -> None:
    """What the comparison above can see: another step is another row."""
    setting = setting_of(by_id("nadam")[0])
    with pytest.raises(AssertionError):
        check_tensors(Later(setting), setting, False)  # type: ignore[arg-type]


class Later:
    """A setting whose rows are those of the next step."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def device_rows(self, t: Tensor, *rest: Any) -> tuple[list[DeviceRow], Tensor | None]:
        return self.setting.device_rows(t + (t > 0).double(), *rest)


class StaysOnDevice(TorchDispatchMode):
    """Fails on what waits for a device, or copies to or from one: neither can be in a CUDA graph."""

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        forbidden = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.lift_fresh.default")
        assert str(function) not in forbidden
        for tensor in (x for x in (*args, result) if isinstance(x, Tensor)):
            assert tensor.device.type == "cuda", f"{function} leaves the device"
        return result


@parametrize_cases()
def test_rows_of_tensors_never_leave_the_device(case: Case) -> None:
    settings, group = settings_of(case)
    with FakeTensorMode() as fake:
        lr, beta, t, carry = (torch.empty(n, dtype=torch.float64, device="cuda") for n in ((), (), 8, 8))
        asked = torch.empty((), dtype=torch.bool, device="cuda")
    changed = {"lr": lr, "capturable": True} | ({"betas": (beta, beta)} if "betas" in group else {})
    setting = settings.of(group | changed)
    assert setting.symbolic
    with fake, StaysOnDevice():
        rows, carried = setting.device_rows(t, carry if has_carry(setting) else None, True, asked)
    assert rows
    assert (carried is not None) == has_carry(setting)
