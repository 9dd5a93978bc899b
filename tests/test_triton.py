"""The Triton backend without a GPU: its tables, its uploads, and every chain under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pathlib
import random
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

import fastopt
from fastopt import backends
from fastopt.backends import native, triton
from fastopt.backends.triton.tables import Bucket, Channel, Entry, Tile, classify, coalesce, item_map

HERE = pathlib.Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), **environment},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )


INTERPRETED = {
    "chains a to l": ("tests/interpreted.py", "-k", "test_fp32 and (sgd or rmsprop or ada)"),
    "chains l to z": ("tests/interpreted.py", "-k", "test_fp32 and not (sgd or rmsprop or ada)"),
    "the kernels": ("tests/interpreted.py", "-k", "of_kernels"),
    "the rest": ("tests/interpreted.py", "-k", "not test_fp32 and not of_kernels"),
    "live changes": ("tests/test_live.py", "tests/test_failing_steps.py", "tests/test_compile.py", "-k", "triton"),
    "whole steps": ("tests/test_whole_step.py", "-k", "not every_rule and not counted_once"),
    "rows of kernels": ("tests/interpreted_rows.py", "-k", "rows_made"),
    "failures": ("tests/interpreted_failures.py",),
    "counted steps": ("tests/interpreted_rows.py", "-k", "not rows_made"),
}
ALIKE = ("the kernels", "rows of kernels")
"""What a kernel computes does not depend on who gave it its work."""


COMPILED = "" if backends.available("native") else "the compiled extension is not there"


@pytest.mark.contract("numbers", backend="triton")
@needs_triton
@pytest.mark.parametrize(
    ("part", "plan"),
    [
        *(
            pytest.param(
                part, "compiled", id=f"{name}-compiled", marks=pytest.mark.skipif(bool(COMPILED), reason=COMPILED)
            )
            for name, part in INTERPRETED.items()
        ),
        *(
            pytest.param(part, "python", id=f"{name}-python")
            for name, part in INTERPRETED.items()
            if name != "whole steps" and (COMPILED or name not in ALIKE)
        ),
    ],
)
def test_interpreted(part: tuple[str, ...], plan: str) -> None:
    """Triton decides on its interpreter when it is imported, so these run in processes of their own."""
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "-p", "triton_interpreter", "-W", "ignore::RuntimeWarning")
    result = run("-m", "pytest", *options, *part, FASTOPT_TEST_BACKENDS="triton", FASTOPT_TEST_PLAN=plan)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout[-2000:]


def test_reasons() -> None:
    """Each says what to do. (This process has no interpreter.)"""
    assert "TRITON_INTERPRET=1" in backends.why_not("triton", "cpu")
    assert "mps" in backends.why_not("triton", "mps")
    if not torch.cuda.is_available():
        assert backends.why_not("triton", "cuda")
        with pytest.raises(RuntimeError, match="compiles for GPUs"):
            fastopt.SGD([torch.zeros(1)], backend="triton")


ABSENT = """
import sys
sys.modules["triton"] = None
import importlib.util
importlib.util.find_spec = lambda name, package=None, find=importlib.util.find_spec: (
    None if name == "triton" else find(name, package))
import torch, fastopt
torch.cuda.is_available, there = lambda: True, torch.cuda.is_available
torch.cuda.get_device_capability = lambda index: (9, 0)
print(fastopt.backends.why_not("triton", "cuda"))
torch.cuda.is_available = there
p = torch.nn.Parameter(torch.ones(3))
optimizer = fastopt.Adam([p])
p.grad = torch.ones(3)
optimizer.step()
"""


def test_without_triton_only_this_backend_is_missing() -> None:
    result = run("-c", ABSENT)
    assert result.returncode == 0, result.stderr
    assert "pip install triton" in result.stdout


def test_importing_fastopt_does_not_import_triton() -> None:
    if run("-c", "import sys, torch; assert 'triton' not in sys.modules").returncode:
        pytest.skip("this torch imports Triton itself")
    result = run("-c", "import sys, fastopt; fastopt.info(); assert 'triton' not in sys.modules")
    assert result.returncode == 0, result.stderr


@needs_triton
def test_an_interpreter_set_too_late_is_refused() -> None:
    code = (
        "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; import fastopt; "
        "print(fastopt.backends.why_not('triton', 'cpu'))"
    )
    assert "before" in run("-c", code, TRITON_INTERPRET="0").stdout


def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """native, then triton, then torch's own code; on a CPU never triton."""
    missing: set[str] = set()
    monkeypatch.setattr(backends, "available", lambda name, device="cpu": name not in missing)
    assert backends.choose("cuda", None) == "native"
    missing.add("native")
    assert backends.choose("cuda", None) == "triton"
    assert backends.choose("cpu", None) is None
    missing.add("triton")
    assert backends.choose("cuda", None) is None


@pytest.mark.skipif(bool(COMPILED), reason=COMPILED)
@needs_triton
def test_each_gpu_is_judged_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them: both backends serve the first, Triton the second, none the last."""
    module = native.extension()
    built = types.SimpleNamespace(**{**vars(module), "has_cuda": lambda: True, "cuda_archs": lambda: "90"})
    monkeypatch.setattr(native, "_load", lambda: (built, ""))
    monkeypatch.setattr(native, "_why_not_gpu", lambda index: "" if index == 0 else f"not built for cuda:{index}")
    monkeypatch.setattr(triton, "_why_not_gpu", lambda index: "" if index < 2 else f"cuda:{index} is old")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    assert [backends.choose(device, None) for device in ("cuda:0", "cuda:1", "cuda:2")] == ["native", "triton", None]
    assert backends.choose("cuda", None) == "native"
    with pytest.raises(backends.BackendError, match="device 'cuda:1': not built for cuda:1"):
        backends.choose("cuda:1", "native")
    info = fastopt.info()
    assert info.chosen == {"cpu": "native", "cuda:0": "native", "cuda:1": "triton", "cuda:2": "torch"}
    assert "cuda:2 is old" in str(info)
    monkeypatch.setattr(native, "_why_not_gpu", lambda index: f"not built for cuda:{index}")
    assert backends.why_not("native", "cuda") == "not built for cuda:0"
    assert backends.choose("cuda", None) == "triton"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert fastopt.info().chosen == {"cpu": "native", "cuda": "triton"}


def entry(
    shape: tuple[int, ...] = (8, 8),
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
    strides: tuple[int, ...] | None = None,
    gradient: tuple[int, ...] | None = None,
    states: tuple[torch.dtype, ...] = (torch.float32,),
    length: int = 0,
    tile: Tile | None = None,
) -> Entry:
    def tensor(kind: torch.dtype) -> torch.Tensor:
        wanted = strides or torch.empty(shape, device="meta").stride()
        span = sum((n - 1) * s for n, s in zip(shape, wanted, strict=True)) + 1
        return torch.empty(span + offset, dtype=kind).as_strided(shape, wanted, offset)

    p = tensor(dtype)
    result = Entry(p, p, 0, [tensor(s) for s in states], [], gradient or p.stride(), length, False)
    classify(result, dtype, tile or Tile())
    return result


def test_alignment_classes() -> None:
    """All streams at multiples of 16 bytes, and the slices of a centralised gradient too."""
    assert entry().key.aligned
    assert not entry(offset=1).key.aligned
    assert entry(offset=4).key.aligned
    assert not entry(offset=4, dtype=torch.bfloat16).key.aligned  # 8 bytes
    assert entry(offset=8, dtype=torch.bfloat16).key.aligned
    assert entry((6, 8), length=8).key.aligned
    assert not entry((6, 6), length=6).key.aligned
    assert not entry((6, 4), dtype=torch.bfloat16, length=4).key.aligned
    assert not entry((6, 4), states=(torch.bfloat16,), length=4).key.aligned


def test_memory_that_is_one_run_is_not_walked() -> None:
    assert entry((3, 4, 5)).key.rank == 0
    assert entry((3, 4), strides=(1, 3)).key.rank == 0  # all streams are transposed alike
    assert entry((3, 4), strides=(1, 3), gradient=(4, 1)).key.rank == 2
    assert entry((3, 4), strides=(8, 2)).key.rank == 1
    assert entry((3, 4), strides=(6, 1)).key.rank == 2
    assert entry((3, 4), strides=(1, 3), length=4).key.rank == 2  # slices are not runs
    assert entry((2, 3, 4), strides=(24, 8, 1), gradient=(12, 4, 1)).key.rank == 2
    assert entry((2, 3, 4), gradient=(0, 0, 0)).key.rank == 1
    assert entry((1, 9), strides=(77, 1)).key.rank == 0
    assert entry((0, 3), gradient=(1, 1)).key.rank == 0
    assert entry((2, 3, 2, 3), strides=(18, 1, 9, 3), length=18).key.rank == 0  # channels_last keeps its slices


def test_coalesced_dimensions_visit_the_same_memory() -> None:
    generator = random.Random(0)
    for _ in range(300):
        shape = [generator.choice((1, 2, 3)) for _ in range(generator.randrange(5))]
        order = generator.sample(range(len(shape)), len(shape))
        dense = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))]).stride()
        gaps = [generator.choice((0, 1, 5, 12)) for _ in shape]
        sizes, walks = coalesce(shape, [dense, gaps])
        for strides, walk in zip((dense, gaps), walks, strict=True):
            want = [sum(map(int.__mul__, at, strides)) for at in itertools.product(*map(range, shape))]
            got = [sum(map(int.__mul__, at, walk)) for at in itertools.product(*map(range, sizes))]
            assert got == want


def test_every_element_is_in_one_item() -> None:
    tile = Tile(chunk=64, block=16, longest=100)
    for mean, length in ((triton.kernels.FLAT, 0), (triton.kernels.ROWS, 100), (triton.kernels.SPLIT, 250)):
        shapes = [(n, max(1, length)) for n in (1, 3, 200)] if length else [(1,), (64,), (65,), (1000,)]
        entries = [entry(shape, length=length, tile=tile) for shape in shapes]
        assert {e.key.mean for e in entries} == {mean}
        bucket = Bucket(entries[0].key, entries, 0, tile)
        seen = [torch.zeros(e.p.numel(), dtype=torch.int32) for e in entries]
        for which, part in bucket.items.tolist():
            n = entries[which].p.numel()
            if mean == triton.kernels.FLAT:
                begin, end = part * 64, min(n, part * 64 + 64)
            elif mean == triton.kernels.ROWS:
                begin, end = part * 100, part * 100 + 100
            else:
                row, chunk = divmod(part, 4)
                begin = row * 250 + chunk * 64
                end = min(row * 250 + 250, begin + 64)
            seen[which][begin:end] += 1
        assert all((s == 1).all() for s in seen)
        assert bucket.programs == len(bucket.items)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gradient", [None, (1, 8)])
def test_every_thread_has_elements_of_its_own(dtype: torch.dtype, gradient: tuple[int, ...] | None) -> None:
    tile = triton.tables.TILE
    assert tile.elements(entry(dtype=dtype, gradient=gradient).key) >= 32 * tile.warps


def test_large_tensors_come_first_and_empty_ones_have_no_items() -> None:
    items = item_map(torch.tensor([1, 0, 3]), torch.tensor([2, 0, 1]))
    assert items.tolist() == [[2, 0], [2, 1], [2, 2], [0, 0]]


def test_items_of_a_tensor_beyond_32_bits() -> None:
    """Parts fit 32 bits; where one starts is computed in 64 (`span`)."""
    e = entry((8,))
    e.p = torch.empty(2**33 + 7, device="meta")
    parts = -(-e.p.numel() // Tile().chunk)
    assert parts < 2**31 < parts * Tile().chunk
    counts = torch.tensor([parts])
    assert item_map(counts)[-1].tolist() == [0, parts - 1]


def test_table_rows() -> None:
    """Addresses of p and states, elements, slice, first item, then sizes and strides, the innermost first."""
    tile = Tile()
    flat = [entry((5,)), entry((9000,))]
    bucket = Bucket(flat[0].key, flat, 0, tile)
    row = bucket.table[1].tolist()
    assert row == [flat[1].p.data_ptr(), flat[1].tensors[0].data_ptr(), 0, 0, 0, 9000, 0, 1]
    walked = entry((3, 4), strides=(8, 1), gradient=(4, 1))
    bucket = Bucket(walked.key, [walked], 0, tile)
    assert bucket.table[0].tolist()[triton.kernels.SIZES :] == [4, 3, 1, 8, 1, 4, 1, 8]
    assert bucket.width == bucket.table.shape[1]


class Event:
    """A CUDA event that stays pending until it is waited for."""

    log: list[str]
    recorded: list[int]

    def __init__(self) -> None:
        self.pending = False

    def record(self, stream: int) -> None:
        self.pending = True
        Event.recorded.append(stream)

    def query(self) -> bool:
        return not self.pending

    def synchronize(self) -> None:
        self.pending = False
        Event.log.append("waited")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Enough of CUDA for a channel: events that are never done by themselves, a capture that can be switched on, and
    streams that are their own numbers."""
    state = {"capturing": False, "stream": 1}
    Event.log, Event.recorded = [], []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state["stream"])
    monkeypatch.setattr(triton.tables, "stream_of", lambda device: state["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return state


def channel(monkeypatch: pytest.MonkeyPatch) -> Channel:
    made = Channel(torch.device("cpu"))
    made._cuda = True
    monkeypatch.setattr(made, "_host", lambda: torch.empty(made._capacity, dtype=torch.uint8))
    return made


def test_no_slot_is_written_before_its_copy_happened(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sender = channel(monkeypatch)
    first = sender.send(b"a" * 16)
    for k in range(1, Channel.SLOTS):
        assert sender.send(bytes([k] * 16)) is first
    assert Event.log == []
    sender.send(b"b" * 16)
    assert Event.log == ["waited"]
    assert bytes(sender.sent.bytes[:16].tolist()) == b"b" * 16


def test_captured_blocks_are_never_written_again(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sender = channel(monkeypatch)
    sender.send(b"a" * 16)
    cuda["capturing"] = True
    for k in range(Channel.SPARE):
        sender.send(bytes([k] * 16))
    with pytest.raises(RuntimeError, match="between the captures"):
        sender.send(b"c" * 16)
    with pytest.raises(RuntimeError, match="is being captured"):
        sender.send(b"d" * 10_000)
    cuda["capturing"] = False
    for _ in range(10):
        sender.send(b"e" * 16)
    assert [bytes(slot.memory[:16].tolist()) for slot, _ in sender._kept] == [
        bytes([k] * 16) for k in range(Channel.SPARE)
    ]
    cuda["capturing"] = True
    sender.send(b"f" * 16)


def test_memory_is_lent_to_streams_that_it_was_not_allocated_on(
    cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent and what kernels write may be of different streams."""
    lent: list[torch.Tensor] = []
    monkeypatch.setattr(triton.tables, "lend", lambda *tensors: lent.extend(tensors))
    memory = channel(monkeypatch)
    memory.send(b"1" * 16)
    cuda["stream"] = 2
    scratch = memory.scratch(64)
    assert not lent
    cuda["stream"] = 1
    memory.send(b"1" * 16)
    assert memory.scratch(64) is scratch
    assert lent == [scratch.bytes]


def test_a_copy_is_waited_for_on_the_stream_that_it_was_made_on(
    cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = channel(monkeypatch)
    monkeypatch.setattr(triton.tables, "lend", lambda *tensors: None)
    for stream in (1, 1, 2, 1, 2):
        cuda["stream"] = stream
        sender.send(b"a" * 16)
    assert Event.recorded == [1, 1, 2, 1, 2]


def test_tables_are_not_made_during_capture(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, launched = steps_without_kernels(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None, raising=False
    )
    cuda["capturing"] = True
    optimizer.step()
    assert launched
    p = optimizer.param_groups[0]["params"][0]
    p.data = torch.zeros(3)
    with pytest.raises(RuntimeError, match="before capturing"):
        optimizer.step()


def steps_without_kernels(monkeypatch: pytest.MonkeyPatch, count: int, **kwargs: Any) -> tuple[Any, list[Any]]:
    """An Adam whose launches are recorded instead of run."""
    launched: list[Any] = []
    monkeypatch.setitem(backends._WHY_NOT, "triton", lambda device: "")

    def bound(self: Any, *update: Any) -> list[Any]:
        return [(types.SimpleNamespace(start=lambda bound: launched.append(update)), None)]

    monkeypatch.setattr(triton.plan.TritonPlan, "_bound", bound)
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(count)]
    optimizer = fastopt.Adam(params, backend="triton", **kwargs)
    for p in params:
        p.grad = torch.zeros(3)
    optimizer.step()
    launched.clear()
    return optimizer, launched


def test_thousands_of_tensors_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and addresses arrive in order; absent gradients have no row."""
    optimizer, launched = steps_without_kernels(monkeypatch, 5000)
    params = optimizer.param_groups[0]["params"]
    for p in params[::7]:
        p.grad = None
    optimizer.step()
    ((bucket, _, _, aligned, grads, rows, coefficients, _),) = launched
    order = [e.p for e in bucket.entries]
    addresses = grads.tensor[grads.at : grads.at + 5000].tolist()
    assert addresses == [0 if p.grad is None else p.grad.data_ptr() for p in order]
    index = rows.tensor[rows.at : rows.at + 5000].tolist()
    assert index == [-1 if p.grad is None else 0 for p in order]
    assert aligned
    assert coefficients.tensor[coefficients.at] == 1.0  # the scale of the gradient comes first


def test_tables_stay_as_long_as_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, launched = steps_without_kernels(monkeypatch, 4)
    p = optimizer.param_groups[0]["params"][0]
    optimizer.step()
    first = launched[-1][0]
    p.grad = torch.ones(3)
    optimizer.step()
    assert launched[-1][0] is first
    p.data = torch.zeros(3)
    optimizer.step()
    assert launched[-1][0] is not first
    assert launched[-1][0].table[0, 0] == p.data_ptr()


@pytest.mark.skipif(bool(COMPILED), reason=COMPILED)
def test_a_step_like_the_last_is_started_as_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only addresses and coefficients are new then; whatever else differs is found out anew."""
    optimizer, launched = steps_without_kernels(monkeypatch, 3)
    found: list[int] = []
    send = triton.compiled.CompiledPlan._send_taken
    monkeypatch.setattr(
        triton.compiled.CompiledPlan, "_send_taken", lambda self, *given: found.append(1) or send(self, *given)
    )
    (group,) = optimizer.param_groups
    p, q, r = group["params"]

    def anew(**attributes: Any) -> bool:
        """Whether a step with these attributes of the optimizer was found out anew; it tells its kernel what holds."""
        found.clear()
        vars(optimizer).update(attributes)
        optimizer.step()
        for name in attributes:
            delattr(optimizer, name)
        _, _, _, _, grads, rows, coefficients, _ = launched[-1]
        assert grads.tensor[grads.at : grads.at + 3].tolist() == [
            0 if t.grad is None else t.grad.data_ptr() for t in (p, q, r)
        ]
        at = coefficients.at + 8 * rows.tensor[rows.at + 1]
        step = optimizer.state[q]["step"].item()
        assert coefficients.tensor[at + 7] == torch.tensor(group["lr"] / (1 - 0.9**step))
        return bool(found)

    assert not anew()
    q.grad = torch.ones(3)
    group["lr"] = 0.25
    assert not anew()
    kept, p.grad = p.grad, None
    assert anew()
    assert not anew()
    p.grad = kept
    assert anew()
    assert not anew()
    flat = torch.zeros(8)
    for offset, expected in ((1, True), (1, True), (0, True), (4, False)):
        q.grad = flat[offset : offset + 3]
        assert anew() == expected
    assert anew(grad_scale=torch.ones(()), found_inf=torch.zeros(()))
    assert not launched[-1][-1].absent
    assert anew()
    assert launched[-1][-1].absent
    assert not anew()
    assert optimizer.engine()._plans["triton"].launches == 1
    r.data = torch.zeros(3)
    assert anew()


def test_a_kernel_that_cannot_be_loaded_or_started_is_named() -> None:
    class Compiled:
        def __init__(self, loads: bool) -> None:
            self.loads = loads

        def __getitem__(self, grid: Any) -> Any:
            if not self.loads:
                raise MemoryError("of a test")
            return self._start

        def _start(self, *given: Any) -> None:
            raise MemoryError("of a test")

    for loads in (False, True):
        kernel = types.SimpleNamespace(warmup=lambda *given, loads=loads, **options: Compiled(loads))
        ready = triton.launch.Ready("adam", torch.device("cuda:1"), kernel, (), 4)
        with pytest.raises(RuntimeError, match="the Triton kernel adam failed on cuda:1: of a test"):
            ready.start(ready.bound(1))


def test_a_kernel_that_is_still_being_compiled_is_waited_for() -> None:
    """As in `triton.AsyncCompileMode`."""
    kernel = types.SimpleNamespace(warmup=lambda *given, **options: types.SimpleNamespace(result=lambda: "compiled"))
    assert triton.launch.Ready("adam", torch.device("cuda:1"), kernel, (), 4).compiled(1) == "compiled"


def test_equal_settings_share_a_row_across_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, launched = steps_without_kernels(monkeypatch, 1)
    for k in range(40):
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.zeros(3)
        optimizer.add_param_group({"params": [p], "lr": 0.1 * (k % 4)})
    optimizer.step()
    ((_, _, _, _, _, rows, _, _),) = launched
    # The first parameter is a step ahead; the others have four settings.
    assert sorted(set(rows.tensor[rows.at : rows.at + 41].tolist())) == [0, 1, 2, 3, 4]


def _another_state(p: torch.nn.Parameter, optimizer: Any) -> None:
    optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}


def _another_kind(t: torch.Tensor) -> None:
    t.data = t.data.view(torch.float16)


CHANGES: dict[str, Any] = {
    "state dict": _another_state,
    "state tensor": lambda p, o: o.state[p].update(exp_avg=o.state[p]["exp_avg"].clone()),
    "state moved": lambda p, o: o.state[p]["exp_avg"].set_(o.state[p]["exp_avg"].clone()),
    "state dtype": lambda p, o: _another_kind(o.state[p]["exp_avg"]),
    "state strides": lambda p, o: o.state[p]["exp_avg"].t_(),
    "state gone": lambda p, o: o.state[p].pop("exp_avg"),
    "state of another": lambda p, o: o.state.update({torch.zeros(1): {}}),
    "counter": lambda p, o: o.state[p].update(step=torch.tensor(1.0)),
    "counter dtype": lambda p, o: setattr(o.state[p]["step"], "data", o.state[p]["step"].data.view(torch.int32)),
    "parameter moved": lambda p, o: setattr(p, "data", p.data.clone()),
    "parameter dtype": lambda p, o: _another_kind(p),
    "parameter strides": lambda p, o: setattr(p, "data", p.data.t()),
    "parameter negated": lambda p, o: setattr(p, "data", torch._neg_view(p.data)),
    "state negated": lambda p, o: setattr(o.state[p]["exp_avg"], "data", torch._neg_view(o.state[p]["exp_avg"])),
    "parameter shape": lambda p, o: setattr(p, "data", p.data[:1]),
    "gradient dtype": lambda p, o: _another_kind(p.grad),
    "gradient strides": lambda p, o: setattr(p, "grad", p.grad.t().contiguous().t()),
    "gradient shape": lambda p, o: setattr(p.grad, "data", p.grad.data[:1]),
    "gradient released": lambda p, o: p.grad.untyped_storage().resize_(0),
    "gradient negated": lambda p, o: setattr(p, "grad", torch._neg_view(p.grad)),
    "gradient sparse": lambda p, o: setattr(p, "grad", p.grad.to_sparse()),
    "group": lambda p, o: o.add_param_group({"params": [torch.zeros(1)]}),
    "parameter left": lambda p, o: o.param_groups[0]["params"].pop(),
    "state layout": lambda p, o: o.param_groups[0].update(amsgrad=True),
}


@pytest.mark.parametrize("guards", [True, False], ids=["guards", "no guards"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tables_that_no_longer_fit_are_noticed(change: Any, guards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._WHY_NOT, "triton", lambda device: "")
    monkeypatch.setattr(triton.plan.TritonPlan, "_bound", lambda *args: [])
    if not guards:
        monkeypatch.setattr(triton.plan, "_guards", lambda tensors: None)
    params = [torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = fastopt.Adam(params, backend="triton")
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    plan = optimizer.engine()._plans["triton"]
    assert plan.gather(optimizer.param_groups, optimizer.state, None)
    with torch.no_grad():
        change(params[1], optimizer)
    assert not plan.gather(optimizer.param_groups, optimizer.state, None)


def test_a_hyper_parameter_changed_in_place_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are looked up again where a value could have changed without being another object."""
    lr = torch.tensor(0.5)
    optimizer, launched = steps_without_kernels(monkeypatch, 2, lr=lr)
    for step, value in ((2, 0.5), (3, 0.25)):
        lr.fill_(value)
        optimizer.step()
        coefficients = launched[-1][6]
        step_size = coefficients.tensor[coefficients.at + 7]  # scale, decay, and last of Adam's own six
        assert step_size == torch.tensor(value / (1 - 0.9**step))
