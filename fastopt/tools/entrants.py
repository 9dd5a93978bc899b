"""What a user may write for an optimizer, and what `fastopt.compare` makes of it: an `Entrant`.

Accepted: a name (``"Adam"``, any case), a name with options (``"SGD(momentum=0.9)"``), a wrapper around another
(``"Lookahead(RAdam, k=6)"``), torch's own (``"torch.Adam(fused=True)"``), a class, or a callable ``(params, lr)
-> Optimizer``.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

Make: TypeAlias = Callable[[list[Tensor], float], Optimizer]
OptimizerSpec: TypeAlias = str | type[Optimizer] | Make

FALLBACK_LR = 1e-3
ALIASES = {"amsgrad": "Adam(amsgrad=True)", "lookahead": "Lookahead(Adam)"}
LABELS = {"amsgrad": "AMSGrad"}
VARIANTS = {"SGD": ("SGD", "SGD(momentum=0.9)"), "Adam": ("Adam", "AMSGrad"), "Lookahead": ("Lookahead(Adam)",)}
"""What the default list shows of a public class, where that is not the class with its defaults."""


@dataclass(frozen=True)
class Entrant:
    """One optimizer in a comparison: ``make(params, lr)`` builds it, ``default_lr`` is where a search for lr starts."""

    name: str
    make: Make
    default_lr: float


def default_names() -> list[str]:
    """Every optimizer that fastopt exports, and the variants worth a line of their own."""
    return [variant for name in _public() for variant in VARIANTS.get(name, (name,))]


def entrants(specs: Sequence[OptimizerSpec] | Mapping[str, OptimizerSpec] | None) -> list[Entrant]:
    """The entrants that ``specs`` stand for; whether they can be made is for `try_on` to find."""
    if isinstance(specs, str):
        raise TypeError(
            f"optimizers must be a list or a mapping, got the string {specs!r}: write {split_names(specs) or ['Adam']}"
        )
    if specs is None:
        specs = default_names()
    if not isinstance(specs, Iterable):
        raise TypeError(f"optimizers must be a list or a mapping from names; got {specs!r}: write [{specs!r}]")
    labelled = specs.items() if isinstance(specs, Mapping) else [("", spec) for spec in specs]
    if unnamed := [label for label, _ in labelled if not isinstance(label, str)]:
        raise TypeError(f"the keys of optimizers are names for the table; got {unnamed[0]!r}")
    found = [_entrant(label, spec) for label, spec in labelled]
    if not found:
        raise ValueError("no optimizers given: name at least one, or leave optimizers out to compare all")
    names = [entrant.name for entrant in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        written = all(isinstance(spec, str) for _, spec in labelled)
        advice = "leave one out" if written else "name them, as in optimizers={'one': ..., 'other': ...}"
        raise ValueError(f"two optimizers share the name {repeated[0]!r}: {advice}")
    return found


def try_on(entrant: Entrant, params: list[Tensor]) -> None:
    """Make the optimizer once, for parameters like those it will train, to find mistakes before training."""
    try:
        made: object = entrant.make(params, entrant.default_lr)
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{entrant.name} cannot be made for this model: {describe(error)}") from error
    if not isinstance(made, Optimizer):
        raise TypeError(f"{entrant.name} made a {type(made).__name__}: a callable (params, lr) returns an Optimizer")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{entrant.name} cannot be compared: its step() evaluates the model itself, and the others take one step "
            "for one gradient"
        )


def describe(error: Exception) -> str:
    """An error in one line, its type in front."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def split_names(text: str) -> list[str]:
    """Split ``"adam, lookahead(adam, k=5), sgd"`` at the commas outside parentheses."""
    names, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names if name.strip()]


def _entrant(label: str, spec: OptimizerSpec) -> Entrant:
    if isinstance(spec, str):
        named = _read(spec)
        return Entrant(label or named.name, named.make, named.default_lr)
    if isinstance(spec, type):
        if not issubclass(spec, Optimizer):
            raise TypeError(f"an optimizer class is derived from torch.optim.Optimizer; got {spec.__name__}")
        if "optimizer" in inspect.signature(spec).parameters:
            raise TypeError(f"{spec.__name__} wraps another optimizer: give a name such as '{spec.__name__}(Adam)'")
        return Entrant(label or spec.__name__, partial(_build, spec, {}), _default_lr(spec))
    if callable(spec):
        return Entrant(label or getattr(spec, "__name__", type(spec).__name__), spec, FALLBACK_LR)
    raise TypeError(
        f"an optimizer is a name, a class or a callable (params, lr) -> Optimizer; got {type(spec).__name__}: {spec!r}"
    )


def _read(text: str) -> Entrant:
    key = text.strip().lower()
    try:
        tree = ast.parse(ALIASES.get(key, text.strip()), mode="eval").body
    except SyntaxError:
        raise ValueError(f"cannot read the optimizer {text!r}: {_HOW_TO_WRITE}") from None
    entrant = _from_tree(tree, text)
    return Entrant(LABELS.get(key, entrant.name), entrant.make, entrant.default_lr)


_HOW_TO_WRITE = "write a name, 'SGD(momentum=0.9)', 'Lookahead(RAdam, k=6)' or 'torch.Adam(fused=True)'"


def _from_tree(tree: ast.expr, text: str) -> Entrant:
    call = tree if isinstance(tree, ast.Call) else ast.Call(func=tree, args=[], keywords=[])
    name, cls = _class(call.func, text)
    if any(keyword.arg in (None, "lr") for keyword in call.keywords):
        raise ValueError(
            f"cannot read the optimizer {text!r}: lr comes from the grid of lrs, the other options by name"
        )
    try:
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError:
        raise ValueError(f"cannot read the optimizer {text!r}: options must be plain values; {_HOW_TO_WRITE}") from None
    shown = [f"{key}={value!r}" for key, value in options.items()]
    if "optimizer" in inspect.signature(cls).parameters:
        if len(call.args) != 1:
            raise ValueError(f"cannot read the optimizer {text!r}: {name} wraps one other, as in '{name}(Adam)'")
        inner = _from_tree(call.args[0], text)
        wrap = partial(_wrap, cls, options, inner.make)
        return Entrant(f"{name}({', '.join([inner.name, *shown])})", wrap, inner.default_lr)
    if call.args:
        raise ValueError(f"cannot read the optimizer {text!r}: options go by name, as in 'SGD(momentum=0.9)'")
    return Entrant(f"{name}({', '.join(shown)})" if shown else name, partial(_build, cls, options), _default_lr(cls))


def _class(node: ast.expr, text: str) -> tuple[str, type[Optimizer]]:
    if isinstance(node, ast.Name):
        prefix, known, wanted = "", _public(), node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        prefix, known, wanted = "torch.", _optimizers(torch.optim, dir(torch.optim)), node.attr
    else:
        raise ValueError(f"cannot read the optimizer {text!r}: {_HOW_TO_WRITE}")
    for name, cls in known.items():
        if name.lower() == wanted.lower():
            return prefix + name, cls
    accepted = [prefix + name for name in known] + ([] if prefix else ["AMSGrad"])
    close = difflib.get_close_matches((prefix + wanted).lower(), [name.lower() for name in accepted], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"unknown optimizer {prefix + wanted!r}: {hint}the names are {', '.join(accepted)}")


def _public() -> dict[str, type[Optimizer]]:
    import fastopt  # imported here: the package itself imports this module

    return _optimizers(fastopt, fastopt.__all__)


def _optimizers(module: Any, names: Sequence[str]) -> dict[str, type[Optimizer]]:
    values = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }


def _default_lr(cls: type[Optimizer]) -> float:
    parameter = inspect.signature(cls).parameters.get("lr")
    default = None if parameter is None else parameter.default
    return float(default) if isinstance(default, int | float) and default > 0 else FALLBACK_LR


def _build(cls: Callable[..., Optimizer], options: dict[str, Any], params: list[Tensor], lr: float) -> Optimizer:
    return cls(params, lr=lr, **options)


def _wrap(
    cls: Callable[..., Optimizer], options: dict[str, Any], inner: Make, params: list[Tensor], lr: float
) -> Optimizer:
    return cls(inner(params, lr), **options)
