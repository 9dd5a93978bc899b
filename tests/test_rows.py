"""Coefficient rows made where the step lives: csrc/rows.h and `Setting.formulas` against `Setting.at`."""

from __future__ import annotations

import ctypes
import math
import operator
import os
import pathlib
import shlex
import shutil
import subprocess
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from cases import CASES, Case, by_id, parametrize_cases
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastopt
from fastopt.chain import Chain
from fastopt.optimizers.sgd import SGDRule
from fastopt.rule import ROW_RULES, select, to_single
from fastopt.setting import MOST_WRITTEN, OnDevice, Setting, Settings, stays

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


Step: TypeAlias = "float | None"
"""The step to take; None: no gradient, slow weights only."""


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
void make_row(const RowSetting* s, bool stepped, double t, double carry, bool single, bool asked, RowResult* out) {
  *out = stepped ? row_of(*s, t, carry, single, asked) : pull_of(*s, carry);
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


def compiled_row(rows: ctypes.CDLL, setting: Setting, t: Step, carry: float, single: bool, asked: bool) -> Any:
    given = setting.on_device()
    assert given is not None
    result = RowResult()
    stepped, numbers = ctypes.c_bool(t is not None), (ctypes.c_double(t or 0), ctypes.c_double(carry))
    flags = ctypes.c_bool(single), ctypes.c_bool(asked)
    rows.make_row(ctypes.byref(RowSetting.of(given)), stepped, *numbers, *flags, ctypes.byref(result))
    return result


def bits(values: Any) -> list[str]:
    """Doubles so that equal means identical, signs of zeros included."""
    return [float(value).hex() for value in values]


def check_compiled(rows: ctypes.CDLL, setting: Setting, t: Step, carry: float, single: bool, asked: bool) -> None:
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
    check_compiled(compiled, setting_of(case), None, 0.75, True, True)


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
    monkeypatch.setattr("fastopt.setting.stays", lambda tensor, group: True)


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
            for late in (False, True):
                check_formulas(setting, float(t), carry, True, True, late)
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
        assert not stays(half, flags)
    assert not stays(on_device, {"capturable": False, "fused": None})


Numbers = dict[str, Any]


def single(x: Any) -> Any:
    return np.float64(np.float32(x))


WORDS: Numbers = {
    "number": np.float64,
    "power": lambda a, b: np.float64(float(a) ** float(b)),
    "root": lambda x: np.float64(float(x) ** 0.5) if x >= 0 else np.float64("nan"),
    "remainder": operator.mod,
    "to_single": single,
    "select": lambda condition, a, b: a if condition else b,
    "opposite": lambda condition: not condition,
}
"""What the functions of a formula mean on the host: `Setting.at` computes the same."""


def follow(setting: Setting, t: Step, carry: float, single: bool, asked: bool | None, due: Numbers) -> list[Any]:
    """The paths that the formulas choose for a step, each as (chain, first slot, coefficients, second counter)."""
    formulas = setting.formulas(single, asked)
    names = {name: np.float64(due[name] if name in due else number(setting.input(name))) for name in formulas.inputs}
    names |= {"t": np.float64(t or 0), "carry": np.float64(carry), "stepped": t is not None, **WORDS}
    with np.errstate(all="ignore"):
        for name, text in formulas.lines:
            names[name] = eval(text, {}, names)
        carried = carry if formulas.carried is None or t is None else eval(formulas.carried, {}, names)
        return [
            (path.chain, path.first_slot, [eval(value, {}, names) for value in path.values], carried)
            for path in formulas.paths
            if eval(path.active, {}, names)
        ]


def number(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


def check_formulas(setting: Setting, t: Step, carry: float, single: bool, asked: bool, late: bool) -> None:
    """`setting.formulas` against `setting.at`, bit for bit; `late`: the group's counter decides whether it is asked."""
    due = {"due_step": 11, "due_period": 4 if asked else 5}
    paths = follow(setting, t, carry, single, None if late else asked, due)
    if t is None and not (asked and setting.rule.slow and not setting.rule.period(setting.h)):
        assert not paths
        return
    want = setting.at(t, carry, single, asked)
    ((chain, first_slot, values, carried),) = paths
    assert chain is want.chain
    assert bits(values) == bits(want.coefficients), (t, chain.name)
    assert bits([carried]) == bits([want.carry])
    assert first_slot == setting.row(t, carry, single, asked)[1]


@parametrize_cases()
def test_formulas_say_what_numbers_do(case: Case) -> None:
    setting = setting_of(case)
    for single in (True, False):
        for t, carry in zip((None, *STEPS), [0.75, *carries(setting, STEPS, single)], strict=True):
            for asked in (False, True):
                for late in (False, True):
                    check_formulas(setting, None if t is None else float(t), carry, single, asked, late)


def test_formulas_differ_where_the_steps_do() -> None:
    """What the comparison above can see: another step is another row."""
    setting = setting_of(by_id("nadam")[0])
    ((_, _, values, _),) = follow(setting, 2.0, 1.0, True, False, {})
    assert bits(values) != bits(setting.at(3.0, 1.0, True, False).coefficients)


@parametrize_cases()
def test_formulas_do_not_contain_the_values_of_hyper_parameters(case: Case) -> None:
    """Else a learning rate that is scheduled would compile a kernel at every step. They are not even written again."""
    settings, group = settings_of(case)
    changed = {key: 0.9 * value for key, value in group.items() if isinstance(value, float) and value}
    if "betas" in group:
        changed["betas"] = 0.7, 0.98
    ours, theirs = settings.of(group), settings.of({**group, **changed})
    assert ours is not theirs
    for asked in (False, True, None):
        assert ours.formulas(True, asked) is theirs.formulas(True, asked)


def test_a_formula_cannot_ask_what_only_the_device_knows() -> None:
    class Impatient(SGDRule):
        def coefficients(self, h: Any, t: Any, carry: Any) -> tuple[Any, ...]:
            return (h.lr if t > 3 else 0.0,)

    _, group = settings_of(by_id("sgd")[0])
    setting = Settings(Impatient(), Index()).of(group)
    with pytest.raises(TypeError, match=r"`t > number\(3.0\)` is not known to the host.*`select`"):
        setting.formulas(True, False)


def test_a_zero_keeps_its_sign() -> None:
    """With lr = 0 and a gradient of zero, p - 0 * g must leave a negative zero alone."""
    setting = setting_of(by_id("sgd")[0], lr=0.0)
    ((_, _, values, _),) = follow(setting, 1.0, 1.0, True, False, {})
    assert math.copysign(1.0, values[-1]) == -1.0


def test_numbers_that_choose_stages_are_not_mistaken() -> None:
    """As a configuration file may have them; only the stages ask for them, the formulas do not."""
    settings, group = settings_of(by_id("adam")[0])
    plain, largest = (settings.of({**group, "amsgrad": flag}).formulas(True, False) for flag in (0, 1))
    assert [path.chain.name for path in plain.paths] != [path.chain.name for path in largest.paths]


def test_decisions_are_about_truth_and_not_about_values() -> None:
    settings, group = settings_of(by_id("ranger")[0])
    assert len({settings.of({**group, "k": k}).formulas(True, False) for k in (3, 4, 5, 6)}) == 1


class Odd(SGDRule):
    """Formulas with all that a number can do."""

    def coefficients(self, h: Any, t: Any, carry: Any) -> tuple[Any, ...]:
        x = ((t - 4) % 3) + (t * 0.25) % 1.0 + (4 - t) % -3 + abs(h.lr - t)
        late = (t > 3) & True
        x += select(late | (t == 2), lambda: 2.0, 3.0) + select(late & (h.lr < 1), lambda: 5.0, 7.0)
        x += select((t < 2) | False, lambda: math.inf, 0.0)
        if h.lr**0.5 > 0.1 and select(h.lr > 0, lambda: h.lr, 1.0) and to_single(h.lr) != 2:
            x += int(h.weight_decay) + float(h.lr)
        return (x,)


def test_formulas_can_do_what_numbers_do() -> None:
    _, group = settings_of(by_id("sgd")[0])
    setting = Settings(Odd(), Index()).of(group)
    for t in range(1, 9):
        check_formulas(setting, float(t), 1.0, True, False, False)


def test_what_a_rule_decides_anew_for_every_number_is_forgotten() -> None:
    _, group = settings_of(by_id("sgd")[0])
    settings = Settings(Odd(), Index())
    for k in range(3 * MOST_WRITTEN):
        settings.of({**group, "lr": 0.5 + k}).formulas(True, False)
    assert sum(map(len, settings._written.values())) <= MOST_WRITTEN
