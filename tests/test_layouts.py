"""Tensors that lie each in its own way: permuted, with gaps, expanded, of unlike dtypes. Element for element a step
does what it does with contiguous ones, and nothing beside the elements is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import backends
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastopt

pytestmark = pytest.mark.contract("memory")

RULES = {
    "sgd": lambda ps, b: fastopt.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1, backend=b),
    "adam": lambda ps, b: fastopt.Adam(ps, lr=0.1, amsgrad=True, backend=b),
    "ranger": lambda ps, b: fastopt.Ranger(ps, lr=0.1, k=2, backend=b),
    "lookahead": lambda ps, b: fastopt.Lookahead(fastopt.RMSprop(ps, lr=0.1, momentum=0.9, backend=b), k=2),
}
GAP = -7.0


@st.composite
def laid(draw: Any, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, Tensor]:
    """The value in memory of its own, permuted and with gaps, and the whole of that memory."""
    order = draw(st.permutations(range(value.dim())))
    gaps = [draw(st.sampled_from((1, 1, 1, 2))) for _ in order]
    strides, reach = [0] * value.dim(), 1
    for d, gap in zip(order, gaps, strict=True):
        strides[d] = reach * gap
        reach = strides[d] * value.shape[d]
    memory = torch.full((reach + 5,), GAP, dtype=draw(st.sampled_from(dtypes)))
    view = memory.as_strided(value.shape, strides, draw(st.integers(0, 4)))
    view.copy_(value)
    return view, memory


def shape(draw: Any) -> list[int]:
    if draw(st.booleans()):
        return [draw(st.sampled_from((1, 2, 3, 5, 8, 17))) for _ in range(draw(st.integers(1, 5)))]
    return draw(st.permutations((3, 3, 70, 130)))  # more than a tile, and shares for two threads


@pytest.mark.parametrize("backend", backends(["native", "emulated"]))
@pytest.mark.parametrize("name", RULES)
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_as_contiguous_ones(name: str, backend: str, data: Any) -> None:
    sizes = shape(data.draw)
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    start, numbers = torch.randn(sizes).to(dtype), torch.Generator().manual_seed(0)
    held, memory = data.draw(laid(start, (dtype,)))
    pairs = [torch.nn.Parameter(held), torch.nn.Parameter(start.clone())]
    optimizers = [RULES[name]([p], backend) for p in pairs]
    kept = [(held, memory)]
    for step in range(4):
        gradient = torch.randn(sizes, generator=numbers).to(dtype)
        view, around = data.draw(laid(gradient, (dtype,)))
        pairs[0].grad, pairs[1].grad = view, gradient
        for optimizer in optimizers:
            optimizer.step()
        kept.append((view, around))
        if step == 1:
            for key, state in list(optimizers[0].state[pairs[0]].items()):
                if state.dim() and state.shape == held.shape:
                    other, around = data.draw(laid(state, (state.dtype,)))
                    optimizers[0].state[pairs[0]][key] = other
                    kept.append((other, around))
    assert torch.equal(*pairs)
    for key, state in optimizers[0].state[pairs[0]].items():
        assert torch.equal(state, optimizers[1].state[pairs[1]][key]), key
    for view, around in kept:
        view.detach().fill_(GAP)
        assert (around == GAP).all()
