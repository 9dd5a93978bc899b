"""Optimizers of other libraries whose checkpoints `fastopt.import_state` continues, each with its counterpart here.

`Peer.run` makes what the tests compare with: a checkpoint of the real library in mid-run and the parameters of its next
steps. tests/golden/make.py has written them down, so that the tests need none of the libraries.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import fastopt
from bench.peers import load

SHAPES = ((5,), (3, 4), (2,))
STEPS = 10
Groups = list[dict[str, Any]]


def gradient(shape: Sequence[int], step: int, place: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Exact in every dtype, so that it is the same on every machine."""
    n = torch.arange(torch.Size(shape).numel())
    return (((7 * n + 5 * step + 3 * place) % 11 - 5).to(dtype) / 8).reshape(shape)


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(gradient(shape, 4, i, dtype) * 2) for i, shape in enumerate(SHAPES)]


def in_groups(params: Sequence[Tensor], second: dict[str, Any]) -> Groups:
    return [{"params": list(params[:1])}, {"params": list(params[1:]), **second}]


def advance(optimizer: Optimizer, params: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Steps start..stop-1: all parameters after each as one vector. The second starts late, the third never does."""
    after = []
    for step in range(start, stop):
        for i, p in enumerate(params[:2]):
            p.grad = gradient(p.shape, step, i, p.dtype) if step >= i else None
        optimizer.step()
        after.append(torch.cat([p.detach().flatten() for p in params]))
    return after


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def read(path: Path) -> dict[str, Any]:
    """A file of tests/golden."""
    records: dict[str, Any] = torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)
    return records


@dataclass(frozen=True)
class Peer:
    """A class of another library, and what goes on from its checkpoints here."""

    id: str
    source: str
    theirs: Callable[[Groups], Optimizer]
    ours: Callable[[Groups], Optimizer]
    saved_after: int = 8
    second: tuple[tuple[str, Any], ...] = (("lr", 0.02),)
    """What the second group has of its own."""
    says: str = ""
    """A word of the warning; empty: there is none."""
    ambiguous: bool = False
    """Whether the source has to be named."""

    @property
    def needs(self) -> str:
        """The module without which it cannot run."""
        return next(module for prefix, module in MODULES.items() if self.id.startswith(prefix))

    def run(self) -> dict[str, Any]:
        params = parameters()
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = self.theirs(in_groups(params, dict(self.second)))
            advance(optimizer, params, 0, self.saved_after)
            record = {"params": torch.cat([p.detach().flatten() for p in params]), "state_dict": optimizer.state_dict()}
            record = copy.deepcopy(record)
            record["after"] = torch.stack(advance(optimizer, params, self.saved_after, self.saved_after + STEPS))
        return record


def available(module: str) -> bool:
    try:
        _module(module)
    except ImportError:
        return False
    return True


def _module(name: str) -> Any:
    """ranger.py is a file, in the folder PEER_SOURCES."""
    if name in ("ranger", "ranger2020"):
        path = Path(os.environ.get("PEER_SOURCES", "")) / f"{name}.py"
        if not path.is_file():
            raise ImportError(f"{path} is not there")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load(name)


def _optimi(name: str, **kwargs: Any) -> Callable[[Groups], Optimizer]:
    return lambda groups: getattr(_module("optimi"), name)(groups, foreach=False, **kwargs)


def _kozistr(name: str, **kwargs: Any) -> Callable[[Groups], Optimizer]:
    return lambda groups: getattr(_module("pytorch_optimizer"), name)(groups, **kwargs)


def _lookahead(make: Callable[[Groups], Optimizer], module: str, **kwargs: Any) -> Callable[[Groups], Optimizer]:
    return lambda groups: _module(module).Lookahead(make(groups), **kwargs)


def _timm(name: str, module: str, **kwargs: Any) -> Callable[[Groups], Optimizer]:
    return lambda groups: getattr(_module(module), name)(groups, **kwargs)


def _ranger(module: str, **kwargs: Any) -> Callable[[Groups], Optimizer]:
    return lambda groups: _module(module).Ranger(groups, **kwargs)


def _ours(name: str, **kwargs: Any) -> Callable[[Groups], Optimizer]:
    """With other hyper-parameters than the checkpoint's wherever that holds them."""
    return lambda groups: getattr(fastopt, name)([{"params": g["params"]} for g in groups], **{"lr": 9.0, **kwargs})


def _ours_in_lookahead(name: str, k: int, alpha: float, **kwargs: Any) -> Callable[[Groups], Optimizer]:
    return lambda groups: fastopt.Lookahead(_ours(name, **kwargs)(groups), k, alpha)


DECAY = (("lr", 0.02), ("weight_decay", 0.1))
TORCH_ADAMW = lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=False)  # noqa: E731
TIMM_RADAM = _timm("RAdamLegacy", "timm.optim.radam", lr=0.01)
EPS = {"eps": 1e-12}  # below which eps no longer reaches a bit, wherever it is added

MODULES = {"optimi": "optimi", "kozistr": "pytorch_optimizer", "timm": "timm.optim.radam",
           "pytorch-ranger": "pytorch_ranger", "ranger2020": "ranger2020", "ranger": "ranger"}  # fmt: skip
PEERS = [
    Peer("optimi-sgd", "optimi", _optimi("SGD", lr=0.01, momentum=0.9), _ours("SGD"), second=DECAY),
    Peer("optimi-sgd-dampening", "optimi", _optimi("SGD", lr=0.01, momentum=0.9, dampening=True), _ours("SGD")),
    Peer("optimi-adam", "optimi", _optimi("Adam", lr=0.01), _ours("Adam"), second=DECAY, says="gradient"),
    Peer("optimi-adam-decoupled", "optimi", _optimi("Adam", lr=0.01, decouple_wd=True), _ours("Adam"), second=DECAY,
         says="gradient"),
    Peer("optimi-adamw", "optimi", _optimi("AdamW", lr=0.01), _ours("AdamW"), saved_after=3, second=DECAY,
         says="gradient"),
    Peer("optimi-adamw-max-lr", "optimi", _optimi("AdamW", lr=0.01, decouple_lr=True, max_lr=0.05), _ours("AdamW"),
         second=DECAY, says="gradient"),
    Peer("optimi-radam", "optimi", _optimi("RAdam", lr=0.01, **EPS), _ours("RAdam"), second=DECAY, says="eps"),
    Peer("optimi-radam-3", "optimi", _optimi("RAdam", lr=0.01, **EPS), _ours("RAdam"), saved_after=3, says="eps"),
    Peer("optimi-ranger", "optimi", _optimi("Ranger", lr=0.01, **EPS), _ours("Ranger"), second=DECAY, says="eps"),
    Peer("optimi-ranger-k4", "optimi", _optimi("Ranger", lr=0.01, k=4, alpha=0.8, **EPS), _ours("Ranger"), says="eps"),
    Peer("kozistr-radam", "pytorch_optimizer", _kozistr("RAdam", lr=0.01), _ours("RAdam"), second=DECAY,
         says="gradient"),
    Peer("kozistr-ranger", "pytorch_optimizer", _kozistr("Ranger", lr=0.01, degenerated_to_sgd=True), _ours("Ranger"),
         second=DECAY, says="gradient"),
    Peer("kozistr-ranger-3", "pytorch_optimizer", _kozistr("Ranger", lr=0.01, degenerated_to_sgd=True, use_gc=False),
         _ours("Ranger", use_gc=False), saved_after=3, says="gradient"),
    Peer("kozistr-lookahead-adamw", "pytorch_optimizer",
         _lookahead(TORCH_ADAMW, "pytorch_optimizer", k=5, alpha=0.8),
         _ours_in_lookahead("AdamW", 5, 0.8)),
    Peer("kozistr-lookahead-radam", "pytorch_optimizer",
         _lookahead(_kozistr("RAdam", lr=0.01, degenerated_to_sgd=True), "pytorch_optimizer", k=5),
         _ours_in_lookahead("RAdam", 5, 0.5), says="gradient"),
    Peer("timm-radam", "timm", TIMM_RADAM, _ours("RAdam"), second=DECAY, ambiguous=True),
    Peer("timm-adamw", "timm", _timm("AdamWLegacy", "timm.optim.adamw", lr=0.01, foreach=False), _ours("AdamW")),
    Peer("timm-lookahead-radam", "timm", _lookahead(TIMM_RADAM, "timm.optim.lookahead", k=6, alpha=0.5),
         _ours_in_lookahead("RAdam", 2, 0.1), second=DECAY),
    Peer("timm-lookahead-adamw", "timm", _lookahead(TORCH_ADAMW, "timm.optim.lookahead", k=5, alpha=0.8),
         _ours_in_lookahead("AdamW", 2, 0.1)),
    Peer("ranger", "ranger", _ranger("ranger", lr=0.01), _ours("Ranger"), second=DECAY, ambiguous=True),
    Peer("ranger-4", "ranger", _ranger("ranger", lr=0.01, k=4, alpha=0.8, N_sma_threshhold=7), _ours("Ranger"),
         saved_after=3),
    Peer("pytorch-ranger", "ranger", _ranger("pytorch_ranger", lr=0.01), _ours("Ranger", use_gc=False)),
    Peer("ranger2020", "ranger2020", _ranger("ranger2020", lr=0.01), _ours("Ranger"), ambiguous=False),
]  # fmt: skip
