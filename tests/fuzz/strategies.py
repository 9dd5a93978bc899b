"""Programs for hypothesis to generate and to shrink: the first choice everywhere is the simplest."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from cases import CASES, Case
from harness import signature_has
from hypothesis import strategies as st

import fastopt
from fuzz.program import (
    AddGroup,
    Copy,
    DropState,
    Edit,
    Grad,
    Group,
    Hyper,
    Load,
    LoadBad,
    LoadOwn,
    Operation,
    Param,
    Program,
    ReplaceParam,
    ReplaceState,
    Resize,
    Save,
    SetHyper,
    SetLr,
    Step,
    SwapData,
    ThroughTorch,
    ZeroGrad,
    case_of,
)

SHAPES = [
    (7,),
    (1,),
    (33,),
    (4, 5),
    (),
    (0,),
    (3, 0),
    (2, 3, 3, 3),
    (3, 1, 5),
    (64,),
    (1, 6),
    (130,),
    (5, 16),
    (2, 2, 2, 1, 3),
]
DEEP = (1, 2, 1, 2, 1, 1, 2, 1, 2)  # more dimensions than a device's kernels walk: torch's own code there
LONG = (20_011,)  # more than one thread's worth
LAYOUTS = ["contiguous", "offset1", "offset3", "transposed", "every_other", "gaps", "channels_last", "odd_ones"]
NUMBER = st.integers(0, 30)
OF_ALL: dict[str, list[Any]] = {
    "lr": [0.01, 0.1, 0.0, 0.3, 1e-4],
    "weight_decay": [0.0, 0.03, 0.2],
    "maximize": [False, True],
}
BETAS: list[Any] = [(0.9, 0.999), (0.3, 0.3), (0.5, 0.5), [0.8, 0.95], (0.95, 0.0)]
EPS = [1e-8, 1e-3, 0.5]
# Values that an edit between steps may give. Off may become on only where torch makes the state that it needs.
EDITS: dict[str, dict[str, list[Any]]] = {
    "SGD": {"momentum": [0.0, 0.9, 0.5], "dampening": [0.0, 0.3], "nesterov": [False, True]},
    "RMSprop": {"alpha": [0.99, 0.5, 0.2], "eps": EPS, "momentum": [0.0], "centered": [False]},
    "Adagrad": {"lr_decay": [0.0, 0.1], "eps": EPS},
    "Adam": {"betas": BETAS, "eps": EPS, "amsgrad": [False], "decoupled_weight_decay": [False, True]},
    "AdamW": {"betas": BETAS, "eps": EPS, "amsgrad": [False]},
    "Adamax": {"betas": BETAS, "eps": EPS},
    "NAdam": {"betas": BETAS, "eps": EPS, "momentum_decay": [4e-3, 0.0, 0.2], "decoupled_weight_decay": [False, True]},
    "RAdam": {"betas": BETAS, "eps": EPS, "decoupled_weight_decay": [False, True]},
    "Ranger": {
        "betas": BETAS,
        "eps": EPS,
        "k": [6, 1, 2, 3],
        "alpha": [0.5, 0.0, 0.3, 0.8],
        "n_sma_threshold": [5, 4, 7],
        "use_gc": [True, False],
        "gc_conv_only": [False, True],
        "degenerated_to_sgd": [True, False],
    },
}
LOOKAHEAD: dict[str, list[Any]] = {"lookahead_k": [5, 1, 2, 3], "lookahead_alpha": [0.5, 0.0, 0.3, 0.8]}
# A group may start with these as well.
STARTS: dict[str, dict[str, list[Any]]] = {
    "RMSprop": {"momentum": [0.0, 0.7], "centered": [False, True]},
    "Adam": {"amsgrad": [False, True]},
    "AdamW": {"amsgrad": [False, True]},
}


def edits(case: Case) -> dict[str, list[Any]]:
    return OF_ALL | EDITS[case.name] | (LOOKAHEAD if case.lookahead else {})


@st.composite
def hypers(draw: st.DrawFn, case: Case) -> Hyper:
    """Some hyper-parameters of a group that are not the defaults."""
    known = edits(case) | STARTS.get(case.name, {})
    keys = draw(st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True))
    return tuple((key, draw(st.sampled_from(known[key]))) for key in keys)


class Generator:
    """The strategies of one program, which agree on a case, a backend and the dtypes."""

    def __init__(
        self, case: Case, backend: str, flags: Hyper, dtypes: list[str], mixed_grads: bool, deep: bool
    ) -> None:
        self.case, self.backend, self.flags, self.dtypes = case, backend, flags, dtypes
        shapes = [*SHAPES, DEEP] if deep else SHAPES
        self.deep = deep
        self.shape = st.sampled_from(shapes)
        self.layout = st.sampled_from(LAYOUTS)
        self.dtype = st.sampled_from(dtypes)
        self.param = st.builds(Param, self.shape, self.dtype, self.layout)
        self.hyper = hypers(case)
        grad_dtypes = [None, "fp32", "fp64", "bf16", "fp16"] if mixed_grads and not deep else [None]
        kinds = st.sampled_from(["normal"] * 6 + ["zero", "special", "nan", "inf", "tiny"])
        sparse = ["sparse"] * 5 if case.name in ("SGD", "Adagrad") else []
        layouts = st.sampled_from(["contiguous", "same", *LAYOUTS[1:], "expanded", *sparse])
        self.grad = st.one_of(
            st.builds(Grad, kinds, layouts, st.sampled_from(grad_dtypes), NUMBER),
            st.builds(Grad, seed=NUMBER),
            st.none(),
        )
        some = st.lists(self.grad, min_size=1, max_size=3).map(tuple)
        self.grads = st.one_of(some, some, some, st.just((None,)))
        amp = st.none()
        # How often a 16-bit gradient is rounded while it is unscaled is not part of the numbers contract.
        if dict(flags).get("fused") and not mixed_grads and not {"bf16", "fp16"} & set(dtypes):
            amp = st.one_of(amp, st.tuples(st.sampled_from([1024.0, 3.0]), st.booleans()))
        self.step = st.builds(Step, self.grads, st.sampled_from([False, False, False, True]), amp)

    @property
    def group(self) -> st.SearchStrategy[Group]:
        return st.builds(Group, st.lists(self.param, min_size=1, max_size=3).map(tuple), self.hyper)

    @property
    def edit(self) -> st.SearchStrategy[Operation]:
        known = edits(self.case)
        return st.sampled_from(sorted(known)).flatmap(
            lambda key: st.builds(SetHyper, NUMBER, st.just(key), st.sampled_from(known[key]))
        )

    @property
    def between(self) -> st.SearchStrategy[Operation]:
        """What may happen between two steps."""
        state_dtypes = [None, *(["fp32", "bf16", "fp64"] if not self.deep else [])]
        choices: list[st.SearchStrategy[Operation]] = [
            self.edit,
            st.builds(AddGroup, self.group),
            st.builds(Save, st.sampled_from(["deepcopy", "torch.save"])),
            st.builds(Load, NUMBER),
            st.builds(LoadOwn),
            st.builds(LoadBad, NUMBER),
            st.builds(ThroughTorch, st.lists(self.grads, max_size=2).map(tuple), st.booleans()),
            st.builds(Copy, st.sampled_from(["deepcopy", "pickle"])),
            st.builds(SwapData, NUMBER, self.layout),
            st.builds(Resize, NUMBER, st.one_of(st.none(), NUMBER)),
            st.builds(ZeroGrad, st.booleans()),
            st.builds(ReplaceState, NUMBER, NUMBER, self.layout, st.sampled_from(state_dtypes)),
            st.builds(DropState, NUMBER, st.sampled_from(["parameter", "key", "everything"]), NUMBER),
            st.builds(Edit, NUMBER, st.one_of(st.none(), NUMBER)),
            st.builds(ReplaceParam, NUMBER, self.param),
        ]
        if not self.deep:
            choices.append(
                st.builds(SetLr, NUMBER, st.sampled_from([0.01, 0.1, 0.0]), st.sampled_from(["fp32", "fp64"]))
            )
        return st.one_of(choices)


def flags_of(case: Case, backend: str) -> list[Hyper]:
    """Options that change where steps are counted and who unscales gradients, never a number."""
    found: list[Hyper] = [()]
    if case.name != "Ranger" and signature_has(case, "fused"):
        found.append((("fused", True),))
    one = not (case.name == "Ranger" and case.lookahead)  # of the two optimizers, the outer one is torch code
    if backend in ("emulated", "triton") and one and (case.name == "Ranger" or signature_has(case, "capturable")):
        found.append((("capturable", True),))
    return found


@cache
def usable() -> list[str]:
    """The backends that are built, as often as they are worth it; or Triton's alone, in its interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ["triton"]
    return [b for b in ["native"] * 5 + ["emulated"] * 4 + ["reference"] if fastopt.backends.available(b)]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    case = case_of(draw(st.sampled_from([c.id for c in CASES])))
    backend = draw(st.sampled_from(usable()))
    flags = draw(st.sampled_from(flags_of(case, backend)))
    # Triton's interpreter has other subnormal numbers of fp64 than a GPU.
    fp64 = [] if backend == "triton" else ["fp64"]
    dtypes = draw(st.sampled_from([["fp32"], ["fp32", *fp64], ["fp32", *fp64, "bf16", "fp16"], ["bf16"]]))
    may_be_deep = backend == "emulated" and not flags and not {"bf16", "fp16"} & set(dtypes)
    deep = may_be_deep and draw(st.sampled_from([False] * 9 + [True]))
    make = Generator(case, backend, flags, dtypes, draw(st.booleans()), deep)
    groups = draw(st.lists(make.group, min_size=1, max_size=3))
    threads = draw(st.sampled_from([1] if backend == "triton" else [1, 1, 1, 2]))
    if threads == 2:
        more = [Param(LONG, dtypes[0]), Param((3,), dtypes[-1], times=210)]
        groups.append(Group((more[draw(st.sampled_from([0, 0, 0, 1]))],)))
    # Plans have shorter ways for a step like the last one.
    usual, between = draw(st.lists(make.step, min_size=1, max_size=2)), make.between
    step = st.one_of(st.sampled_from(usual), make.step)
    some = st.booleans().flatmap(lambda steps: step if steps else between)
    operations = (draw(step), *draw(st.lists(some, max_size=20)), draw(step))
    return Program(case.id, backend, tuple(groups), operations, threads, flags)
