"""Coefficient rows made of tensors on a GPU, as the Triton backend has them made, and captured in a graph."""

from __future__ import annotations

import torch
from cases import Case, parametrize_cases
from gpu_support import needs_cuda
from test_rows import asked_ways, check_tensors, has_carry, setting_of, settings_of
from torch import Tensor


@needs_cuda
@parametrize_cases()
def test_rows_of_tensors_on_a_gpu(case: Case) -> None:
    setting = setting_of(case)
    for asked in asked_ways():
        check_tensors(setting, setting, asked.cuda() if isinstance(asked, Tensor) else asked, "cuda", reach=2)


@needs_cuda
@parametrize_cases()
def test_rows_of_tensors_are_captured_in_a_cuda_graph(case: Case) -> None:
    settings, group = settings_of(case)
    lr = torch.tensor(group["lr"], dtype=torch.float64, device="cuda")
    setting = settings.of(group | {"lr": lr, "capturable": True})
    t = torch.full((3,), 1.0, dtype=torch.float64, device="cuda")
    carry = torch.full((3,), 0.5, dtype=torch.float64, device="cuda") if has_carry(setting) else None
    setting.device_rows(t, carry)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, _ = setting.device_rows(t, carry)
    t.fill_(12.0)
    lr.mul_(0.5)
    graph.replay()
    for got, want in zip(rows, setting.device_rows(t, carry)[0], strict=True):
        assert torch.equal(got.active, want.active)
        assert torch.equal(got.coefficients, want.coefficients)
