"""A program: an optimizer, parameters, and what happens to them; and running it beside its twin.

Programs are plain data that print as the Python that makes them, so a failure can be pasted into a test:
``Program(...).run()``. Operations name parameters and groups by a number, taken modulo how many there are.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import oracles
import torch
from cases import DTYPES, TORCH_NAMES, Case, by_id
from harness import SENTINEL, difference, outside, place, torch_threads
from torch import Tensor

import fastopt
from fuzz.twin import SLOW, Saved, Twin

Hyper = tuple[tuple[str, Any], ...]
SPECIALS = (0.0, -0.0, 1.0, -2.5, 1e30, -1e30, 1e-30, 1e-42, 3e38, float("nan"), float("inf"), float("-inf"))


@cache
def case_of(name: str) -> Case:
    return by_id(name)[0]


@cache
def numbers(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "zero":
        x.zero_()
    elif kind == "special":
        x = torch.tensor(SPECIALS, dtype=torch.float64)[(torch.arange(x.numel()) + seed) % len(SPECIALS)].reshape(shape)
    elif kind in ("nan", "inf"):
        x.view(-1)[:1] = float(kind)
    elif kind == "tiny":
        x *= torch.finfo(dtype).tiny
    else:
        x *= 2.0 ** (seed % 12 - 8)
    return x.to(dtype)


def put(value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """As `place`, for whatever layout this shape has."""
    needs = {"expanded": value.dim() > 0 and value.numel() > 0, "channels_last": value.dim() == 4}
    return place(value, layout if needs.get(layout, True) else "contiguous")


def writable(grad: Tensor) -> bool:
    """Whether it is dense and each element is there once."""
    if grad.layout != torch.strided:
        return False
    return not any(s == 0 and n > 1 for s, n in zip(grad.stride(), grad.shape, strict=True))


def dense(grad: Tensor) -> Tensor:
    return grad.to_dense().contiguous()


class Plain:
    """Prints as the shortest Python that makes it."""

    def __repr__(self) -> str:
        given = ((f, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={v!r}' for f, v in given if v != f.default)})"


@dataclass(frozen=True, repr=False)
class Param(Plain):
    shape: tuple[int, ...]
    dtype: str = "fp32"
    layout: str = "contiguous"
    times: int = 1


@dataclass(frozen=True, repr=False)
class Group(Plain):
    params: tuple[Param, ...]
    hyper: Hyper = ()


@dataclass(frozen=True, repr=False)
class Grad(Plain):
    kind: str = "normal"
    layout: str = "contiguous"  # "same": written into the memory of the gradient before
    dtype: str | None = None
    seed: int = 0

    @staticmethod
    def dense(grad: Grad | None) -> Grad | None:
        """One that can be unscaled in place."""
        return replace(grad, layout="contiguous") if grad and grad.layout in ("expanded", "same") else grad


@dataclass(frozen=True, repr=False)
class Operation(Plain):
    def apply(self, run: Run) -> None:
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Program(Plain):
    case: str
    backend: str
    groups: tuple[Group, ...]
    operations: tuple[Operation, ...]
    threads: int = 1
    flags: Hyper = ()

    def run(self) -> Counter[str]:
        """Run it and compare; what it did is counted."""
        run = Run(self)
        for operation in self.operations:
            run.done[type(operation).__name__] += 1
            operation.apply(run)
            run.check(f"after {operation}")
        return run.done


@dataclass
class Kept:
    """A tensor that no later step may touch."""

    what: str
    tensor: Tensor
    value: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tensor = self.tensor.detach()
        self.value = self.tensor.clone()


class Run:
    """A program's optimizer and parameters as they are now, and their twin."""

    def __init__(self, program: Program) -> None:
        self.program, self.case = program, case_of(program.case)
        self.bases: dict[Tensor, Tensor] = {}
        self.kept: list[Kept] = []
        self.saved: list[tuple[Any, Saved]] = []
        self.done: Counter[str] = Counter()
        self.seed = 0
        groups = [self.make_group(g) for g in program.groups]
        self.twin = Twin(self.case, groups)
        self.optimizer: Any = self.case.make(groups, program.backend, **dict(program.flags))

    def make_group(self, group: Group) -> dict[str, Any]:
        params = [self.make(p) for p in group.params for _ in range(p.times)]
        return {"params": params, **dict(group.hyper)}

    def make(self, param: Param) -> torch.nn.Parameter:
        self.seed += 1
        view, base = put(numbers("normal", param.shape, DTYPES[param.dtype], 8 + 12 * self.seed), param.layout)
        p = torch.nn.Parameter(view)
        self.bases[p] = base
        return p

    @property
    def params(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def group(self, number: int) -> int:
        return number % len(self.optimizer.param_groups)

    def group_of(self, index: int) -> int:
        """The group that holds parameter number `index`."""
        owners = [i for i, group in enumerate(self.optimizer.param_groups) for _ in group["params"]]
        return owners[index]

    def param(self, number: int) -> tuple[int, Any]:
        params = self.params
        return number % len(params), params[number % len(params)]

    @property
    def loadable(self) -> bool:
        """Whether torch's classes load its state dict: where `step` is missing they raise."""
        return not any(m.dropped & set(oracles.SCALAR_STATES) for m in self.twin.members)

    def state_key(self, p: Tensor, number: int) -> str | None:
        """One of its states that is no counter."""
        keys = [k for k, v in self.optimizer.state.get(p, {}).items() if k not in oracles.SCALAR_STATES]
        return keys[number % len(keys)] if keys else None

    def keep(self, what: str, *tensors: Any) -> None:
        self.kept += [Kept(what, t) for t in tensors if isinstance(t, Tensor) and t.untyped_storage().nbytes()]

    def keep_states(self, what: str, state: Any) -> None:
        for own in state.values():
            self.keep(what, *own.values())

    def keep_loaded(self, what: str, state: Any) -> None:
        """The states that were copied when they were loaded; what was the optimizer's own stays its own."""
        ours = {id(value) for own in self.optimizer.state.values() for value in own.values()}
        self.keep(what, *(value for own in state.values() for value in own.values() if id(value) not in ours))

    def check(self, when: str) -> None:
        """Everything is what the twin says, and nothing else was written."""
        signs = not self.case.interpolates_fully
        for i, (p, member) in enumerate(zip(self.params, self.twin.members, strict=True)):
            where = f"{when}: parameter {i} {tuple(p.shape)}"
            want = member.shadow.detach().to(member.dtype)
            assert not (text := difference(p.detach().contiguous(), want, signs)), f"{where}: {text}"
            self._check_states(p, member, where, signs)
            if p in self.bases:
                assert (outside(p.detach(), self.bases[p]) == SENTINEL).all(), f"{where}: written outside it"
        for kept in self.kept:
            assert not (text := difference(kept.tensor, kept.value)), f"{when}: {kept.what} changed: {text}"

    def _check_states(self, p: Tensor, member: Any, where: str, signs: bool) -> None:
        got, want = self.optimizer.state.get(p, {}), self.twin.states(member)
        if not want:  # not stepped yet; a step that was skipped may have made state
            assert not any(v.item() for k, v in got.items() if k == "step"), f"{where}: counts steps it did not take"
            return
        for key, value in want.items():
            if key not in got:
                assert key in member.dropped, f"{where}: no state {key}"
                continue
            number = got[key].detach().contiguous()
            if key in oracles.SCALAR_STATES:  # a counter may have any dtype that holds it
                number, value = number.double(), value.double()
            text = difference(number, value, signs)
            assert not text, f"{where}, {key}: {text}"
        if extra := set(got) - set(want):
            assert not [k for k in extra if isinstance(got[k], Tensor)], f"{where}: states {extra} too many"

    def set_grads(self, grads: tuple[Grad | None, ...]) -> None:
        for i, p in enumerate(self.params):
            grad = grads[i % len(grads)]
            if grad is None:
                p.grad = None
                continue
            dtype = p.dtype if grad.dtype is None else DTYPES[grad.dtype]
            value = numbers(grad.kind, tuple(p.shape), dtype, grad.seed + 7 * i)
            if grad.layout == "same" and p.grad is not None and p.grad.dtype == dtype and writable(p.grad):
                p.grad.copy_(value)
                continue
            p.grad, p.grad_dtype = None, None if dtype != p.dtype else p.dtype
            if grad.layout == "sparse" and dtype == p.dtype and self.takes_sparse(i):
                self.done["sparse gradient"] += 1
                p.grad = value.to_sparse(1)
            else:
                p.grad = put(value, "contiguous" if grad.layout in ("same", "sparse") else grad.layout)[0]

    def takes_sparse(self, index: int) -> bool:
        """Whether torch has a rule for a sparse gradient of this parameter: fastopt leaves it to torch's code."""
        if self.case.name not in ("SGD", "Adagrad") or self.program.flags or self.program.backend == "reference":
            return False
        p, member, hyper = self.params[index], self.twin.members[index], self.twin.hyper(self.group_of(index))
        plain = not hyper["weight_decay"] and not hyper.get("momentum") and not isinstance(hyper["lr"], Tensor)
        exact = (
            p.dtype in (torch.float32, torch.float64) and not member.stored
        )  # torch rounds 16 bits after every operation
        # torch 2.13 adds a sparse tensor at twice the storage offset of a dense one, and through no strides.
        right = p.is_contiguous() and p.storage_offset() == 0
        return plain and exact and right and p.dim() > 0 and p.numel() > 0


@dataclass(frozen=True, repr=False)
class Step(Operation):
    grads: tuple[Grad | None, ...]
    closure: bool = False
    amp: tuple[float, bool] | None = None
    """The loss scale and whether there was an overflow, as a GradScaler leaves them on optimizers made with fused."""

    def apply(self, run: Run) -> None:
        run.set_grads(self.grads if self.amp is None else tuple(map(Grad.dense, self.grads)))
        params, optimizer = run.params, run.optimizer
        before = [None if p.grad is None else p.grad.clone() for p in params]
        versions = [p._version for p in params]
        overflow = self.amp is not None and self.amp[1]
        if self.amp is not None:
            scale = torch.tensor(self.amp[0])
            optimizer.grad_scale, optimizer.found_inf = scale, torch.tensor(float(overflow))
            if not overflow:
                before = [None if g is None else g.div(scale) for g in before]
        with torch_threads(run.program.threads), oracles.exact_sqrt():  # the root for what goes to torch's own code
            loss = optimizer.step(lambda: torch.tensor(3.0)) if self.closure else optimizer.step()
        assert loss is None if not self.closure else loss.item() == 3.0
        if self.amp is not None:
            del optimizer.grad_scale, optimizer.found_inf
        for i, (p, grad, version) in enumerate(zip(params, before, versions, strict=True)):
            if grad is not None:
                assert not difference(dense(p.grad), dense(grad)), f"{self}: gradient {i} changed"
                assert overflow or p._version > version, f"{self}: the version of parameter {i} did not change"
        if not overflow:
            run.twin.step(before)


@dataclass(frozen=True, repr=False)
class SetHyper(Operation):
    group: int
    key: str
    value: Any

    def apply(self, run: Run) -> None:
        group = run.group(self.group)
        run.optimizer.param_groups[group][self.key] = self.value
        run.twin.hyper(group)[self.key] = self.value


@dataclass(frozen=True, repr=False)
class SetLr(Operation):
    """The learning rate as a tensor, written in place where it is one already."""

    group: int
    value: float
    dtype: str = "fp32"

    def apply(self, run: Run) -> None:
        at = run.group(self.group)
        group = run.optimizer.param_groups[at]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(self.value)
        else:
            group["lr"] = torch.tensor(self.value, dtype=DTYPES[self.dtype])
        run.twin.hyper(at)["lr"] = group["lr"].item()


@dataclass(frozen=True, repr=False)
class AddGroup(Operation):
    group: Group

    def apply(self, run: Run) -> None:
        group = run.make_group(self.group)
        run.twin.add_group(group)
        run.optimizer.add_param_group(dict(group))


@dataclass(frozen=True, repr=False)
class Save(Operation):
    """A checkpoint, which `Load` may load later."""

    by: str = "deepcopy"  # or "torch.save"

    def apply(self, run: Run) -> None:
        if not run.loadable:
            return
        state_dict = run.optimizer.state_dict()
        if self.by == "torch.save":
            file = io.BytesIO()
            torch.save(state_dict, file)
            file.seek(0)
            state_dict = torch.load(file, weights_only=True)
        else:
            state_dict = copy.deepcopy(state_dict)
        run.keep_states("a checkpoint", state_dict["state"])
        run.saved.append((state_dict, run.twin.save()))


@dataclass(frozen=True, repr=False)
class Load(Operation):
    number: int

    def apply(self, run: Run) -> None:
        if not run.saved:
            return
        state_dict, saved = run.saved[self.number % len(run.saved)]
        if saved.fits(run.twin.groups):
            run.optimizer.load_state_dict(state_dict)
            run.twin.load(saved)
            return
        try:
            run.optimizer.load_state_dict(state_dict)
        except ValueError:
            return
        raise AssertionError("a checkpoint of other groups was loaded")


@dataclass(frozen=True, repr=False)
class LoadOwn(Operation):
    """The state dict of this moment, whose tensors are the optimizer's own."""

    def apply(self, run: Run) -> None:
        if not run.loadable:
            return
        state_dict = run.optimizer.state_dict()
        run.optimizer.load_state_dict(state_dict)
        run.keep_loaded("what was loaded", state_dict["state"])


@dataclass(frozen=True, repr=False)
class LoadBad(Operation):
    """A state of another shape: refused, and nothing has happened."""

    param: int

    def apply(self, run: Run) -> None:
        index, p = run.param(self.param)
        state_dict = copy.deepcopy(run.optimizer.state_dict())
        own = state_dict["state"].get(index, {})
        key = next((k for k in own if k not in oracles.SCALAR_STATES and isinstance(own[k], Tensor)), None)
        if (
            key is None or not run.loadable or run.case.name in ("SGD", "RMSprop")
        ):  # a buffer without momentum is nobody's
            return
        own[key] = torch.zeros(*own[key].shape, 2)
        for group in state_dict["param_groups"]:
            group["lr"] = 123.0
        try:
            run.optimizer.load_state_dict(state_dict)
        except ValueError:
            return
        raise AssertionError(f"{key} of shape {tuple(own[key].shape)} was loaded for {tuple(p.shape)}")


@dataclass(frozen=True, repr=False)
class ThroughTorch(Operation):
    """torch.optim takes over, makes some steps, and hands back: its state dict, or itself to be converted."""

    grads: tuple[tuple[Grad | None, ...], ...] = ()
    convert: bool = False

    def apply(self, run: Run) -> None:
        if run.case.name not in TORCH_NAMES or run.case.lookahead or run.program.flags:
            return
        if any(m.dropped for m in run.twin.members):
            return
        wide = all(m.dtype in (torch.float32, torch.float64) for m in run.twin.members)
        for group in run.optimizer.param_groups:
            group["lr"] = float(group["lr"])  # torch computes with a tensor in that tensor's dtype
        groups = [dict(group) for group in run.optimizer.param_groups]
        theirs = run.case.make_torch(groups)
        theirs.load_state_dict(run.optimizer.state_dict())
        run.twin.cast()
        for grads in self.grads if wide else ():  # torch rounds 16 bits after every operation
            run.set_grads(tuple(g and Grad(g.kind, g.layout, None, g.seed) for g in grads))
            with oracles.exact_sqrt():
                theirs.step()
            run.twin.step([p.grad for p in run.params])
        if self.convert:
            run.optimizer = fastopt.convert(theirs, backend=run.program.backend)
        else:
            run.optimizer.load_state_dict(theirs.state_dict())
            run.keep_loaded("torch's state", theirs.state)


@dataclass(frozen=True, repr=False)
class Copy(Operation):
    """The optimizer, with its parameters, is copied; the original stays behind."""

    by: str  # "deepcopy" or "pickle"

    def apply(self, run: Run) -> None:
        old = run.optimizer
        if not run.loadable:
            return
        run.keep("the parameters of the original", *run.params)
        run.keep_states("a state of the original", old.state)
        run.optimizer = copy.deepcopy(old) if self.by == "deepcopy" else pickle.loads(pickle.dumps(old))
        run.bases.clear()


@dataclass(frozen=True, repr=False)
class SwapData(Operation):
    """p.data = the same values in other memory, in another layout."""

    param: int
    layout: str

    def apply(self, run: Run) -> None:
        _, p = run.param(self.param)
        run.keep("the memory the parameter had", p)
        view, base = put(p.detach().clone(), self.layout)
        p.data, run.bases[p] = view, base


@dataclass(frozen=True, repr=False)
class Resize(Operation):
    """FSDP frees a storage and fills it again: the same tensor and storage, its memory elsewhere."""

    param: int
    state: int | None = None

    def apply(self, run: Run) -> None:
        _, p = run.param(self.param)
        key = None if self.state is None else run.state_key(p, self.state)
        t = p.detach() if key is None else run.optimizer.state[p][key]
        storage = t.untyped_storage()
        if not storage.resizable() or any(k.tensor.untyped_storage()._cdata == storage._cdata for k in run.kept):
            return
        everything = torch.empty(0, dtype=t.dtype).set_(storage)
        values, size = everything.clone(), storage.nbytes()
        storage.resize_(0)
        taken = torch.full((size // t.element_size(),), SENTINEL, dtype=t.dtype)  # likely where the values were
        storage.resize_(size)
        torch.empty(0, dtype=t.dtype).set_(storage).copy_(values)
        run.keep("memory given back", taken)


@dataclass(frozen=True, repr=False)
class ZeroGrad(Operation):
    set_to_none: bool

    def apply(self, run: Run) -> None:
        for p in run.params:
            if p.grad is not None and not writable(p.grad):
                p.grad = None  # torch cannot write to it
        run.optimizer.zero_grad(set_to_none=self.set_to_none)
        assert all(p.grad is None or (not self.set_to_none and not p.grad.any()) for p in run.params)


@dataclass(frozen=True, repr=False)
class ReplaceState(Operation):
    """state[key] = another tensor: in another layout, in another dtype."""

    param: int
    state: int
    layout: str
    dtype: str | None = None

    def apply(self, run: Run) -> None:
        index, p = run.param(self.param)
        key = run.state_key(p, self.state)
        member = run.twin.members[index]
        if key is None or key not in run.twin.states(member):
            return
        old = run.optimizer.state[p][key]
        dtype = old.dtype if self.dtype is None else DTYPES[self.dtype]
        run.keep("a state that was replaced", old)
        run.optimizer.state[p][key] = put(old.detach().to(dtype).clone(), self.layout)[0]
        member.stored[key] = dtype
        run.twin.round()


@dataclass(frozen=True, repr=False)
class DropState(Operation):
    """`del state[p]`, one key of it, or `state.clear()`."""

    param: int
    what: str  # "parameter", "everything" or "key"
    state: int = 0

    def apply(self, run: Run) -> None:
        index, p = run.param(self.param)
        member = run.twin.members[index]
        if self.what == "everything":
            run.keep_states("a state that was dropped", run.optimizer.state)
            run.optimizer.state.clear()
            for m in run.twin.members:
                run.twin.drop(m)
        elif self.what == "parameter":
            run.optimizer.state.pop(p, None)
            run.twin.drop(member)
        elif not (run.case.name == "SGD" and run.case.lookahead):  # a pull needs all state: the buffer would be zero
            keys = [k for k in run.twin.states(member) if k not in SLOW and k in run.optimizer.state[p]]
            if keys:
                key = keys[self.state % len(keys)]
                run.keep("a state that was dropped", run.optimizer.state[p].pop(key))
                run.twin.drop_key(member, key)


@dataclass(frozen=True, repr=False)
class Edit(Operation):
    """Values changed in place: of the parameter, or of one of its states."""

    param: int
    state: int | None = None

    def apply(self, run: Run) -> None:
        index, p = run.param(self.param)
        member = run.twin.members[index]
        if self.state is None:
            with torch.no_grad():
                for t in (p, member.shadow):
                    t.mul_(0.5)
        elif (key := run.state_key(p, self.state)) is not None and key in run.twin.states(member):
            for t in (run.optimizer.state[p][key], oracles.states_of(run.twin.oracle, member.shadow)[key]):
                t.mul_(0.5)
        run.twin.round()


@dataclass(frozen=True, repr=False)
class ReplaceParam(Operation):
    """Another parameter in a group's list, in the place of one."""

    index: int
    param: Param

    def apply(self, run: Run) -> None:
        index, old = run.param(self.index)
        new = run.make(self.param)
        run.keep("a parameter that was replaced", old)
        run.optimizer.state.pop(old, None)
        run.twin.replace(index, new)
        group = run.optimizer.param_groups[run.group_of(index)]
        group["params"] = [new if p is old else p for p in group["params"]]
        run.saved.clear()  # of another model
