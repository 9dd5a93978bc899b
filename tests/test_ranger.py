"""Ranger: the semantics of the original ranger.py, each of the published code's ten defects absent."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases import each_backend
from harness import difference, ramp, same, train, wave
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import fastopt

pytestmark = pytest.mark.contract("ranger", optimizers="Ranger")


def params() -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(ramp(torch.Size(shape).numel()).reshape(shape)) for shape in ((9,), (3, 4), (2, 3, 2, 2))
    ]


@pytest.mark.contract("ranger", "numbers", optimizers="Ranger")
@each_backend
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_alpha_one_without_centralisation_is_radam(dtype: torch.dtype, decay: float, backend: str) -> None:
    """Bit for bit, through the rectified steps and the synchronising ones."""
    ours, theirs = ([torch.nn.Parameter(p.detach().to(dtype)) for p in params()] for _ in range(2))
    ranger = fastopt.Ranger(ours, lr=0.01, alpha=1.0, use_gc=False, weight_decay=decay, backend=backend)
    radam = fastopt.RAdam(
        theirs, lr=0.01, betas=(0.95, 0.999), eps=1e-5, weight_decay=decay, decoupled_weight_decay=True, backend=backend
    )
    for step in range(14):
        for ps, o in ((ours, ranger), (theirs, radam)):
            for i, p in enumerate(ps):
                p.grad = wave(p.shape, step + i).to(dtype)
            o.step()
        for p, q in zip(ours, theirs, strict=True):
            assert not difference(p.detach(), q.detach(), signed_zeros=False), f"step {step + 1}"
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(ranger.state[p][key], radam.state[q][key])


@pytest.mark.contract("ranger", "construction", optimizers="Ranger")
def test_signature_and_defaults() -> None:
    signature = inspect.signature(fastopt.Ranger)
    defaults = {name: p.default for name, p in signature.parameters.items()}
    expected = {"lr": 1e-3, "alpha": 0.5, "k": 6, "n_sma_threshold": 5, "betas": (0.95, 0.999), "eps": 1e-5,
                "weight_decay": 0, "use_gc": True, "gc_conv_only": False, "degenerated_to_sgd": True,
                "maximize": False, "capturable": False, "backend": None}  # fmt: skip
    assert {k: v for k, v in defaults.items() if k in expected} == expected
    assert list(defaults)[:11] == ["params", *list(expected)[:10]]
    keyword = ("degenerated_to_sgd", "maximize", "capturable", "backend")
    assert all(signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in keyword)


def test_the_originals_misspelling_is_accepted() -> None:
    optimizer = fastopt.Ranger(params(), N_sma_threshhold=4)
    assert optimizer.param_groups[0]["n_sma_threshold"] == 4
    assert "N_sma_threshhold" not in optimizer.param_groups[0]


BAD: list[dict[str, Any]] = [
    {"n_sma_threshold": 3.9}, {"n_sma_threshold": 0}, {"N_sma_threshhold": 3}, {"n_sma_threshold": float("nan")},
    {"k": 0}, {"k": -1}, {"k": 1.5}, {"alpha": -0.1}, {"alpha": 1.01}, {"alpha": float("nan")},
    {"lr": -1.0}, {"lr": float("nan")}, {"eps": -1e-5}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)},
    {"weight_decay": -1}, {"lr": torch.tensor([0.1, 0.2])},
]  # fmt: skip


@pytest.mark.contract("ranger", "construction", optimizers="Ranger")
@pytest.mark.parametrize("kwargs", BAD, ids=lambda kw: str(kw).replace(" ", ""))
def test_bad_hyper_parameters_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        fastopt.Ranger(params(), **kwargs)
    (value,) = kwargs.values()
    if not isinstance(value, (tuple, torch.Tensor)):
        assert str(value) in str(error.value), "the message must say what was given"


@pytest.mark.contract("ranger", "construction", optimizers="Ranger")
@pytest.mark.parametrize("kwargs", [{"n_sma_threshold": 3}, {"k": 0}, {"alpha": 2.0}], ids=str)
def test_bad_values_in_a_group_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        fastopt.Ranger([{"params": params(), **kwargs}])


def test_defaults_are_arguments_after_loading_too() -> None:
    optimizer = fastopt.Ranger(params())
    optimizer.load_state_dict(optimizer.state_dict())
    assert fastopt.Ranger(params(), **optimizer.defaults).defaults == optimizer.defaults


@pytest.mark.contract("ranger", "state", optimizers="Ranger")
@each_backend
def test_states_and_their_order(backend: str) -> None:
    ps = params()
    optimizer = fastopt.Ranger(ps, backend=backend)
    assert not optimizer.state
    train(optimizer, ps[:2], 0, 1)
    assert list(optimizer.state[ps[0]]) == ["step", "exp_avg", "exp_avg_sq", "slow_buffer"]
    assert ps[2] not in optimizer.state
    assert torch.equal(optimizer.state[ps[1]]["slow_buffer"], params()[1])
    assert optimizer.state[ps[0]]["step"].dtype == torch.float32
    assert optimizer.state[ps[0]]["step"].dim() == 0


@each_backend
def test_synchronisation_counts_each_parameters_own_steps(backend: str) -> None:
    """k = 3: a parameter whose first gradient came one step later synchronises one step later."""
    ps = params()[:2]
    optimizer = fastopt.Ranger(ps, lr=0.1, k=3, alpha=0.0, use_gc=False, backend=backend)
    back = []
    for step in range(7):
        ps[0].grad = wave((9,), step)
        ps[1].grad = wave((3, 4), step) if step else None
        optimizer.step()
        back.append(tuple(torch.equal(p, q) for p, q in zip(ps, params(), strict=False)))
    assert [b[0] for b in back] == [False, False, True, False, False, True, False]
    assert [b[1] for b in back] == [True, False, False, True, False, False, True]


@each_backend
@pytest.mark.parametrize("conv_only", [False, True])
def test_centralised_gradients_have_row_means_of_zero(conv_only: bool, backend: str) -> None:
    """Linear: per output row; convolution: per filter; vectors never; gc_conv_only: convolutions alone."""
    ps = params()
    optimizer = fastopt.Ranger(ps, gc_conv_only=conv_only, backend=backend)
    for p in ps:
        p.grad = wave(p.shape, 0) + 3
    optimizer.step()
    vector, linear, conv = (optimizer.state[p]["exp_avg"].flatten(1 if p.dim() > 1 else 0) for p in ps)
    assert vector.mean().abs() > 0.05
    assert (linear.mean(1).abs() < 1e-6).all() != conv_only
    assert (conv.mean(1).abs() < 1e-6).all()


@each_backend
@pytest.mark.parametrize("shape", [(64, 1000), (1000, 3), (1, 5000), (3, 1), (2, 0), (0, 2), (128, 31, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_mean_is_accumulated_in_float64(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    """Rows of +-1e6 that cancel: a float32 accumulation would lose the mean altogether."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = fastopt.Ranger([p], lr=1.0, betas=(0.0, 0.999), k=1000, backend=backend)
    n = torch.Size(shape).numel()
    g = (torch.randn(n, dtype=torch.float64).reshape(shape) + 1e6 * (-1.0) ** torch.arange(n).reshape(shape)).to(dtype)
    p.grad = g
    optimizer.step()
    if n:
        exact = g.double() - g.double().flatten(1).mean(1).reshape(-1, *[1] * (len(shape) - 1))
        # lr = 1, beta1 = 0, not yet rectified: the step is the centralised gradient, rounded to p's dtype.
        tolerance = 1e-9 if dtype == torch.float64 else 0.07  # half an ulp at 1e6
        torch.testing.assert_close(-p.detach().double(), exact, rtol=0, atol=tolerance)


@pytest.mark.contract("ranger", "layouts", optimizers="Ranger")
@each_backend
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gradient transposed", "expanded"])
def test_centralisation_follows_dimensions_and_not_memory(layout: str, backend: str) -> None:
    """Row 0 is p[0] wherever its elements lie."""
    shape = (2, 3, 4, 5) if layout == "channels_last" else (6, 4)
    start, grads = torch.zeros(shape), [wave(shape, s) for s in range(8)]
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    if layout == "transposed":
        p = torch.nn.Parameter(start.t().contiguous().t())
    elif layout == "channels_last":
        p = torch.nn.Parameter(start.to(memory_format=torch.channels_last))
    ours, theirs = fastopt.Ranger([p], lr=0.1, backend=backend), fastopt.Ranger([q], lr=0.1, backend=backend)
    for g in grads:
        if layout == "expanded":
            g = g[:1].expand(shape)
        p.grad, q.grad = g, g.clone(memory_format=torch.contiguous_format)
        if layout == "gradient transposed":
            p.grad = g.t().contiguous().t()
        elif layout == "channels_last":
            p.grad = g.to(memory_format=torch.channels_last)
        ours.step()
        theirs.step()
        assert not difference(p.detach().contiguous(), q.detach())


@each_backend
def test_undegenerated_steps_wait_for_the_rectification(backend: str) -> None:
    """The RAdam authors' default: no update, and no decay, while rho <= threshold; the moments do fill."""
    ps = params()
    optimizer = fastopt.Ranger(ps, lr=0.1, weight_decay=0.1, k=2, degenerated_to_sgd=False, backend=backend)
    train(optimizer, ps, 0, 5)
    assert same(ps, params())
    assert all((optimizer.state[p]["exp_avg"] != 0).any() and optimizer.state[p]["step"] == 5 for p in ps)
    train(optimizer, ps, 5, 7)
    assert not any(torch.equal(p, q) for p, q in zip(ps, params(), strict=True))


@each_backend
def test_undegenerated_never_moves_where_rectification_never_comes(backend: str) -> None:
    """beta2 <= .6: rho stays below 4 for ever."""
    ps = params()
    optimizer = fastopt.Ranger(ps, lr=0.1, betas=(0.9, 0.5), degenerated_to_sgd=False, backend=backend)
    train(optimizer, ps, 0, 20)
    assert same(ps, params())


@each_backend
@pytest.mark.parametrize(("threshold", "first"), [(4, 5), (4.995, 5), (5, 6), (20, 21)])
def test_threshold_decides_when_rectification_starts(threshold: float, first: int, backend: str) -> None:
    """beta2 = .999: rho_5 = 4.996, rho_6 = 5.994. A rectified step is small, an unrectified one is lr * g."""
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = fastopt.Ranger([p], lr=1.0, n_sma_threshold=threshold, k=1000, backend=backend)
    for t in range(1, first + 2):
        before = p.item()
        p.grad = torch.ones(1)
        optimizer.step()
        moved = before - p.item()
        assert (moved < 0.2) == (t >= first), f"step {t} moved by {moved}"


@each_backend
def test_1_use_gc_false_is_honoured(backend: str) -> None:
    """ranger.py centralised regardless."""
    p = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = fastopt.Ranger([p], use_gc=False, backend=backend)
    p.grad = torch.ones(2, 3)
    optimizer.step()
    assert (p < 0).all()
    q = torch.nn.Parameter(torch.zeros(2, 3))
    centralising = fastopt.Ranger([q], backend=backend)
    q.grad = torch.ones(2, 3)
    centralising.step()
    assert (q == 0).all()


@each_backend
def test_2_decay_is_not_written_into_the_moment(backend: str) -> None:
    """ranger2020.py, lr .01, decay .1, gradient 0: exp_avg became .1 and p .98 instead of .999."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = fastopt.Ranger([p], lr=0.01, weight_decay=0.1, backend=backend)
    p.grad = torch.zeros(4)
    optimizer.step()
    assert (optimizer.state[p]["exp_avg"] == 0).all()
    assert p.tolist() == pytest.approx([0.999] * 4, abs=1e-7)


@each_backend
def test_3_groups_with_other_betas_have_their_own_coefficients(backend: str) -> None:
    """A buffer shared by groups gave the second one -.03325 instead of -.01671."""
    together = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    options = [{"betas": (0.95, 0.999), "lr": 0.01}, {"betas": (0.5, 0.9), "lr": 0.02}]
    groups = [{"params": [p], **o} for p, o in zip(together, options, strict=True)]
    optimizer = fastopt.Ranger(groups, backend=backend)
    for p, o in zip(together, options, strict=True):
        alone = torch.nn.Parameter(torch.zeros(1))
        single = fastopt.Ranger([alone], backend=backend, **o)
        for _ in range(8):
            alone.grad = torch.ones(1)
            single.step()
        o["expected"] = alone
        assert p.item() == 0
    for _ in range(8):
        for p in together:
            p.grad = torch.ones(1)
        optimizer.step()
    for p, o in zip(together, options, strict=True):
        assert torch.equal(p, o["expected"])


@each_backend
@pytest.mark.parametrize("degenerated", [True, False])
def test_4_never_ascends(degenerated: bool, backend: str) -> None:
    """A step size of -1, unguarded, climbed for five steps."""
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = fastopt.Ranger([p], lr=0.01, k=1000, degenerated_to_sgd=degenerated, backend=backend)
    for _ in range(10):
        before = p.item()
        p.grad = torch.ones(1)
        optimizer.step()
        assert p.item() <= before


@pytest.mark.contract("ranger", "hooks", optimizers="Ranger")
@each_backend
def test_5_closure_is_called_and_its_loss_returned(backend: str) -> None:
    ps, calls = params(), []
    optimizer = fastopt.Ranger(ps, backend=backend)

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in ps)
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), torch.Tensor)
    assert calls == [True]
    assert not same(ps, params())


@pytest.mark.contract("ranger", "hooks", optimizers="Ranger")
@each_backend
def test_6_gradients_are_left_alone(backend: str) -> None:
    ps = params()
    optimizer = fastopt.Ranger(ps, k=1, maximize=True, weight_decay=0.1, backend=backend)
    grads = [wave(p.shape, 1) + 1 for p in ps]
    for _ in range(3):
        for p, g in zip(ps, grads, strict=True):
            p.grad = g
        optimizer.step()
    assert all(torch.equal(g, wave(p.shape, 1) + 1) and g._version == 0 for p, g in zip(ps, grads, strict=True))


@pytest.mark.contract("ranger", "wrappers", optimizers="Ranger")
@each_backend
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_7_copies_are_complete(how: str, backend: str) -> None:
    """An attribute lost in a copy raised at the next step."""
    ps = params()
    optimizer = fastopt.Ranger(ps, lr=0.05, k=4, gc_conv_only=True, degenerated_to_sgd=False, backend=backend)
    train(optimizer, ps, 0, 7)
    pair = (ps, optimizer)
    twin_ps, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(twin, list(twin_ps), 7, 15)
    train(optimizer, ps, 7, 15)
    assert same(ps, list(twin_ps))


@each_backend
def test_8_every_hyper_parameter_may_differ_by_group(backend: str) -> None:
    """alpha and the threshold were read from the optimizer, k from the group."""
    options: list[dict[str, Any]] = [
        {}, {"alpha": 0.0}, {"alpha": 1.0}, {"k": 2}, {"n_sma_threshold": 4}, {"use_gc": False}, {"gc_conv_only": True},
        {"degenerated_to_sgd": False}, {"eps": 0.1}, {"weight_decay": 0.1}, {"maximize": True}, {"lr": 0.2},
        {"betas": (0.5, 0.9)},
    ]  # fmt: skip
    together = [params() for _ in options]
    optimizer = fastopt.Ranger(
        [{"params": ps, **o} for ps, o in zip(together, options, strict=True)], lr=0.05, backend=backend
    )
    train(optimizer, [p for ps in together for p in ps], 0, 0)
    for step in range(9):
        for ps in together:
            for i, p in enumerate(ps):
                p.grad = wave(p.shape, step + i)
        optimizer.step()
    results = []
    for ps, o in zip(together, options, strict=True):
        alone = params()
        train(fastopt.Ranger(alone, **{"lr": 0.05, "backend": backend, **o}), alone, 0, 9)
        assert same(ps, alone), str(o)
        results.append(ps)
    assert all(not same(results[0], other) for other in results[1:])


@each_backend
def test_9_nothing_is_printed(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    ps = params()
    optimizer = fastopt.Ranger(ps, backend=backend)
    train(optimizer, ps, 0, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copy.deepcopy(optimizer)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@each_backend
def test_10_the_direction_of_a_waiting_step_is_never_a_stale_one(backend: str) -> None:
    """One parameter rectified, the next still waiting: the second must not move along the first one's direction."""
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    optimizer = fastopt.Ranger([first, second], lr=0.1, degenerated_to_sgd=False, k=1000, backend=backend)
    for step in range(9):
        first.grad = torch.ones(3)
        second.grad = torch.ones(3) if step >= 5 else None
        optimizer.step()
    assert (first < 0).all()
    assert (second == 0).all()


def test_it_is_an_optimizer() -> None:
    optimizer = fastopt.Ranger(params())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "Ranger" in repr(optimizer)
    assert "backend" not in optimizer.param_groups[0]


@pytest.mark.contract("ranger", "state", optimizers="Ranger")
@each_backend
@pytest.mark.parametrize("at", [1, 5, 6, 9])
def test_resume_is_exact(at: int, backend: str) -> None:
    whole, first = params(), params()
    train(fastopt.Ranger(whole, lr=0.05, weight_decay=0.1, backend=backend), whole, 0, 15)
    optimizer = fastopt.Ranger(first, lr=0.05, weight_decay=0.1, backend=backend)
    train(optimizer, first, 0, at)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = fastopt.Ranger(second, k=2, alpha=0.1, backend=backend)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(resumed, second, at, 15)
    assert same(whole, second)


@pytest.mark.contract("ranger", "import", optimizers="Ranger")
@each_backend
def test_checkpoint_of_the_original_loads(backend: str) -> None:
    """lessw2020's file: `step` as an int, the misspelt key, no keys of ours, slow_buffer in float32."""
    ps = params()[:1]
    state = {"step": 7, "exp_avg": ramp(9) * 0.1, "exp_avg_sq": ramp(9) ** 2, "slow_buffer": ramp(9)}
    group = {"lr": 0.01, "alpha": 0.5, "k": 6, "step_counter": 0, "betas": (0.95, 0.999), "N_sma_threshhold": 5,
             "eps": 1e-5, "weight_decay": 0, "params": [0]}  # fmt: skip
    optimizer = fastopt.Ranger(ps, backend=backend)
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [group]})
    train(optimizer, ps, 7, 8)
    assert optimizer.state[ps[0]]["step"] == 8
    assert not torch.equal(ps[0].detach(), ramp(9))


@each_backend
def test_slow_weights_context(backend: str) -> None:
    ps = params()
    optimizer = fastopt.Ranger(ps, lr=0.1, k=4, backend=backend)
    train(optimizer, ps, 0, 6)
    fast = [p.detach().clone() for p in ps]
    slow = [optimizer.state[p]["slow_buffer"].clone() for p in ps]
    with optimizer.slow_weights():
        assert same(ps, slow)
        assert not same(ps, fast)
    assert same(ps, fast)
    with pytest.raises(ZeroDivisionError), optimizer.slow_weights():
        raise ZeroDivisionError
    assert same(ps, fast)
    untouched = params()
    train(twin := fastopt.Ranger(untouched, lr=0.1, k=4, backend=backend), untouched, 0, 11)
    train(optimizer, ps, 6, 11)
    assert same(ps, untouched)
    assert twin.state[untouched[0]]["step"] == 11


@pytest.mark.contract("ranger", "schedulers", optimizers="Ranger")
@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
], ids=["one-cycle", "cyclic", "cosine"])  # fmt: skip
@each_backend
def test_schedulers(make: Any, backend: str) -> None:
    ps = params()
    optimizer = fastopt.Ranger(ps, backend=backend)
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make(optimizer)
        for step in range(8):
            train(optimizer, ps, step, step + 1)
            scheduler.step()
            group = optimizer.param_groups[0]
            seen.add((group["lr"], group["betas"][0]))
    assert len(seen) > 3


@pytest.mark.contract("ranger", "state", "distributed", optimizers="Ranger")
@each_backend
def test_distributed_checkpoint_functions(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = fastopt.Ranger(model.parameters(), lr=0.05, backend=backend)
    train(optimizer, list(model.parameters()), 0, 8)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    other = fastopt.Ranger(twin.parameters(), lr=0.9, k=2, backend=backend)
    set_optimizer_state_dict(twin, other, saved)
    assert same(list(model.parameters()), list(twin.parameters()))
    train(optimizer, list(model.parameters()), 8, 16)
    train(other, list(twin.parameters()), 8, 16)
    assert same(list(model.parameters()), list(twin.parameters()))


@pytest.mark.contract("ranger", "live", "hooks", optimizers="Ranger")
@each_backend
def test_add_param_group_and_hooks(backend: str) -> None:
    ps, calls = params(), []
    optimizer = fastopt.Ranger(ps[:1], lr=0.1, backend=backend)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(optimizer, ps[:1], 0, 2)
    optimizer.add_param_group({"params": ps[1:], "lr": 0.2, "k": 3})
    train(optimizer, ps, 2, 4)
    assert [optimizer.state[p]["step"].item() for p in ps] == [4, 2, 2]
    assert len(calls) == 4


@pytest.mark.contract("ranger", "fallback", optimizers="Ranger")
def test_sparse_gradients_are_refused_by_name() -> None:
    p = torch.nn.Parameter(torch.ones(4, 3))
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.Ranger([other, p])
    p.grad, other.grad = torch.ones(4, 3).to_sparse(), torch.ones(3)
    with pytest.raises(RuntimeError, match="Ranger does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))


@pytest.mark.contract("ranger", "fallback", optimizers="Ranger")
@each_backend
def test_complex_parameters(backend: str) -> None:
    """Real and imaginary parts are separate coordinates, as in every torch rule."""
    z = torch.nn.Parameter(torch.complex(ramp(6), -ramp(6)))
    pair = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    options: dict[str, Any] = {"lr": 0.1, "use_gc": False, "backend": backend}
    ours, theirs = fastopt.Ranger([z], **options), fastopt.Ranger([pair], **options)
    for step in range(8):
        z.grad = torch.complex(wave((6,), step), wave((6,), step + 1))
        pair.grad = torch.view_as_real(z.grad).clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), pair.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.contract("ranger", "layouts", optimizers="Ranger")
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameter_given_twice_steps_twice() -> None:
    """torch warns about it and then steps in turn; both updates see their own t."""
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    twice, once = fastopt.Ranger([p, p], lr=0.1), fastopt.Ranger([q], lr=0.1)
    for _ in range(8):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        twice.step()
        once.step()
        once.step()
        assert torch.equal(p.detach(), q.detach())
        assert twice.state[p]["step"] == once.state[q]["step"]


@each_backend
@pytest.mark.parametrize(
    "edit", [{"k": 0}, {"k": 2.5}, {"k": None}, {"alpha": 2.0}, {"alpha": -1.0}, {"alpha": math.nan}], ids=str
)
def test_edited_slow_weights_are_checked_before_anything_changes(edit: dict[str, Any], backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = fastopt.Ranger([p], lr=0.1, backend=backend)
    for _ in range(3):
        p.grad = torch.ones(5)
        optimizer.step()
    value, (name, given), before = p.detach().clone(), *edit.items(), dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(edit)
    with pytest.raises(ValueError, match=f"Invalid {name} value: {given}"):
        optimizer.step()
    assert torch.equal(p, value)
    assert optimizer.state[p]["step"] == 3
    optimizer.param_groups[0].update(before)
    optimizer.step()
    assert optimizer.state[p]["step"] == 4
