"""Checkpoints of other libraries: their runs continue here; what cannot continue is refused before anything changes.

What the real libraries saved, and where they went from there, is in tests/golden; where they are installed they are run
too. See peers.py.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import PEERS, SHAPES, STEPS, Peer, advance, available, in_groups, parameters, read, through_a_file
from test_own_rules import PulledBack

import fastopt

pytestmark = pytest.mark.contract("import")

GOLDEN = Path(__file__).resolve().parent / "golden"
RECORDS = {
    name: record for path in GOLDEN.glob("*.pt.gz") if "fastopt" not in path.name for name, record in read(path).items()
}
by_name = {peer.id: peer for peer in PEERS}
each_peer = pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.id)
Change = Callable[[dict[str, Any]], Any]


def tolerance(after: torch.Tensor) -> float:
    """One ulp of the largest parameter per step: either side rounds a parameter up to three times by half an ulp."""
    return STEPS * torch.finfo(torch.float32).eps * after.abs().max().item()


def ours_for(peer: Peer, record: dict[str, Any]) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    values = record["params"].split([torch.Size(shape).numel() for shape in SHAPES])
    params = [torch.nn.Parameter(v.reshape(shape).clone()) for v, shape in zip(values, SHAPES, strict=True)]
    return peer.ours(in_groups(params, {})), params


def continued(peer: Peer, record: dict[str, Any]) -> tuple[torch.Tensor, fastopt.ImportReport]:
    """The parameters of the next steps here. Warnings are errors, unless the peer is known to differ."""
    optimizer, params = ours_for(peer, record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if peer.says:
            with pytest.warns(UserWarning, match=peer.says):
                report = fastopt.import_state(optimizer, record["state_dict"], peer.source)
        else:
            report = fastopt.import_state(optimizer, record["state_dict"], peer.source)
    return torch.stack(advance(optimizer, params, peer.saved_after, peer.saved_after + STEPS)), report


def assert_continues(peer: Peer, record: dict[str, Any]) -> None:
    after, report = continued(peer, record)
    assert report.source == peer.source
    assert report.parameters == 2
    assert not report.dropped
    assert (after - record["after"]).abs().max().item() <= tolerance(record["after"])


@each_peer
def test_checkpoint_of_the_real_library_continues(peer: Peer) -> None:
    assert_continues(peer, RECORDS[peer.id])


@each_peer
def test_the_real_library_run_now_continues(peer: Peer) -> None:
    if not available(peer.needs):
        pytest.skip(f"{peer.needs} is not installed; its checkpoint in tests/golden is tested all the same")
    record = peer.run()
    record["state_dict"] = through_a_file(record["state_dict"])
    assert_continues(peer, record)


@each_peer
def test_the_tolerance_notices_a_moment_that_is_one_percent_off(peer: Peer) -> None:
    record = copy.deepcopy(RECORDS[peer.id])
    state_dict = record["state_dict"]
    for states in state_dict.get("base_optimizer", state_dict)["state"].values():
        states["exp_avg"].mul_(1.01)
    after, _ = continued(peer, record)
    assert (after - record["after"]).abs().max().item() > 2 * tolerance(record["after"])


@each_peer
def test_nothing_is_shared_with_the_checkpoint(peer: Peer) -> None:
    record = copy.deepcopy(RECORDS[peer.id])
    continued(peer, record)
    flat = torch.utils._pytree.tree_leaves
    for mine, kept in zip(flat(record["state_dict"]), flat(RECORDS[peer.id]["state_dict"]), strict=True):
        assert torch.equal(mine, kept) if isinstance(mine, torch.Tensor) else mine == kept


@each_peer
def test_source_is_recognised_where_the_checkpoint_shows_it(peer: Peer) -> None:
    optimizer, _ = ours_for(peer, RECORDS[peer.id])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if peer.ambiguous:
            with pytest.raises(ValueError, match="say source="):
                fastopt.import_state(optimizer, RECORDS[peer.id]["state_dict"])
        else:
            report = fastopt.import_state(optimizer, RECORDS[peer.id]["state_dict"])
            assert report.source == ("ranger" if peer.source == "ranger2020" else peer.source)


TORCH = ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")


@pytest.mark.parametrize("name", [*TORCH, "Ranger", "Lookahead"])
def test_own_and_torchs_checkpoints_are_recognised_and_continue_bit_for_bit(name: str) -> None:
    extra = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}

    def make(module: Any, params: Any, lr: float) -> Any:
        if name == "Lookahead":
            return fastopt.Lookahead(fastopt.Adam(in_groups(params, {}), lr=lr), k=3)
        return getattr(module, name)(in_groups(params, {}), lr=lr, **extra)

    for module in (fastopt, torch.optim if name in TORCH else fastopt):
        whole, params = parameters(), parameters()
        uninterrupted = make(fastopt, whole, 0.02)
        want = advance(uninterrupted, whole, 0, 12)
        first = make(fastopt, params, 0.02)
        advance(first, params, 0, 7)
        state_dict = make(module, parameters(), 0.02).state_dict() | {"state": first.state_dict()["state"]}
        if name == "Lookahead":
            state_dict = first.state_dict()
        second = make(fastopt, params, 9.0)
        report = fastopt.import_state(second, state_dict)
        assert (report.source, report.dropped, report.differs) == ("torch", {}, [])
        assert all(torch.equal(a, b) for a, b in zip(advance(second, params, 7, 12), want[7:], strict=True))


@pytest.mark.parametrize("saved", [*TORCH, "Ranger", "Lookahead"])
def test_another_rule_of_torchs_or_ours_is_refused(saved: str) -> None:
    """Where decay is on: without it AdamW is Adam, and a checkpoint of one goes on in the other."""

    def make(name: str, decay: float) -> Any:
        if name == "Lookahead":
            return fastopt.Lookahead(fastopt.Adam(in_groups(parameters(), {}), weight_decay=decay))
        return getattr(fastopt, name)(in_groups(parameters(), {}), weight_decay=decay)

    for decay in (0.1, 0.0):
        state_dict = make(saved, decay).state_dict()
        accepted = set()
        for name in (*TORCH, "Ranger"):
            optimizer = make(name, 0.5)
            before = copy.deepcopy(optimizer.state_dict()["param_groups"])
            try:
                fastopt.import_state(optimizer, state_dict)
                accepted.add(name)
            except ValueError:
                assert optimizer.state_dict()["param_groups"] == before
        if saved == "Lookahead":
            assert not accepted
        elif saved in ("Adam", "AdamW"):
            # torch's Adam has a flag for decoupled decay, which goes with the group.
            assert accepted == ({"Adam", "AdamW"} if saved == "AdamW" or not decay else {"Adam"})
        elif saved in ("RAdam", "Adamax"):  # whose groups may be alike: before a step there is nothing else
            assert saved in accepted <= {"RAdam", "Adamax"}
        else:
            assert accepted == {saved}


def test_classes_of_ones_own() -> None:
    """With a rule of their own, or with keys in their groups that elsewhere are another rule's."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = PulledBack([p], lr=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    report = fastopt.import_state(PulledBack([torch.nn.Parameter(torch.ones(3))]), optimizer.state_dict(), "torch")
    assert report.parameters == 1
    groups = [{"params": [p], "alpha": 0.5}]
    saved = fastopt.SGD(groups, lr=0.1).state_dict()
    fastopt.import_state(fastopt.SGD(groups, lr=0.2), saved)
    with pytest.raises(ValueError, match="for it has alpha"):
        fastopt.import_state(fastopt.SGD([p]), saved)


def test_a_warning_that_is_an_error_comes_before_anything_changes() -> None:
    peer = by_name["optimi-radam"]
    optimizer, _ = ours_for(peer, RECORDS[peer.id])
    before = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="optimi adds eps"):
            fastopt.import_state(optimizer, RECORDS[peer.id]["state_dict"])
    assert optimizer.state_dict() == before


def test_hyper_parameters_of_the_checkpoint_win_and_the_rest_is_named() -> None:
    peer = by_name["kozistr-ranger"]
    optimizer, _ = ours_for(peer, RECORDS[peer.id])
    with pytest.warns(UserWarning, match="every parameter counts its own") as caught:
        report = fastopt.import_state(optimizer, RECORDS[peer.id]["state_dict"])
    assert str(report) == str(caught[0].message)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.02]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1]
    assert set(report.assumed) == {"maximize", "n_sma_threshold", "degenerated_to_sgd", "use_gc", "gc_conv_only"}
    fresh, params = ours_for(peer, RECORDS[peer.id])
    advance(fresh, params, 0, 2)
    assert [list(g) for g in optimizer.state_dict()["param_groups"]] == [
        list(g) for g in fresh.state_dict()["param_groups"]
    ]
    assert [list(s) for s in optimizer.state.values()] == [list(s) for s in fresh.state.values()]


def test_keys_of_schedulers_and_users_survive_and_names_are_kept() -> None:
    record = copy.deepcopy(RECORDS["optimi-adamw"])
    for group in record["state_dict"]["param_groups"]:
        group.update(initial_lr=0.5, lr_scale=0.1)
    params = parameters()
    named = [{"params": [("a", params[0])]}, {"params": [("b", params[1]), ("c", params[2])]}]
    optimizer = fastopt.AdamW(named)
    with pytest.warns(UserWarning, match="gradient"):
        fastopt.import_state(optimizer, record["state_dict"])
    assert [g["initial_lr"] for g in optimizer.param_groups] == [0.5, 0.5]
    assert [g["lr_scale"] for g in optimizer.param_groups] == [0.1, 0.1]
    assert [g["param_names"] for g in optimizer.param_groups] == [["a"], ["b", "c"]]


def test_frozen_parameters_are_no_reason_to_warn() -> None:
    peer = by_name["optimi-adam"]
    optimizer, params = ours_for(peer, RECORDS[peer.id])
    params[2].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastopt.import_state(optimizer, RECORDS[peer.id]["state_dict"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kahan_compensation_is_dropped_and_said(dtype: torch.dtype) -> None:
    """The moments keep their dtype; what they are multiplied by is rounded once."""
    state_dict = copy.deepcopy(RECORDS["optimi-adamw"]["state_dict"])
    for states in state_dict["state"].values():
        states.update({key: states[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")})
        states["kahan_comp"] = torch.full_like(states["exp_avg"], 1e-3)
    params = parameters(dtype)
    optimizer = fastopt.AdamW(in_groups(params, {}))
    with pytest.warns(UserWarning, match="dropped: kahan_comp"):
        report = fastopt.import_state(optimizer, state_dict)
    assert list(report.dropped) == ["kahan_comp"]
    assert list(optimizer.state[params[0]]) == ["step", "exp_avg", "exp_avg_sq"]
    saved = state_dict["state"][0]["exp_avg_sq"]
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sq"], (saved.double() * (1 - 0.99**3)).to(dtype))


def test_optimis_placeholders_and_gradient_release_are_no_states() -> None:
    """Triton's kernels get a byte as compensation; gradient release keeps the group and a step with each parameter."""
    record = copy.deepcopy(RECORDS["optimi-adam"])
    for group in record["state_dict"]["param_groups"]:
        group["gradient_release"] = True
        del group["step"]
    for states in record["state_dict"]["state"].values():
        states.update(kahan_comp=torch.zeros(1, dtype=torch.uint8), group={"params": []}, step=torch.tensor(8))
    after, report = continued(Peer(**(vars(by_name["optimi-adam"]) | {"says": ""})), record)
    assert not report.dropped
    assert (after - record["after"]).abs().max().item() <= tolerance(record["after"])


def test_eps_of_optimis_radam_is_said_to_weigh_more_and_does() -> None:
    """eps 0.1 instead of 1e-12: the first step after the import is the smaller one by what the report says."""
    peer, record = by_name["optimi-radam"], copy.deepcopy(RECORDS["optimi-radam"])
    for group in record["state_dict"]["param_groups"]:
        group.update(eps=0.1, weight_decay=0)
    optimizer, params = ours_for(peer, record)
    with pytest.warns(UserWarning, match=r"weighs 3\.6 times as much at step 8"):
        fastopt.import_state(optimizer, record["state_dict"])
    m, v = (record["state_dict"]["state"][0][key].double() for key in ("exp_avg", "exp_avg_sq"))
    before = params[0].detach().clone()
    params[0].grad = torch.zeros(5)
    optimizer.step()
    t = 9
    m, v = m * 0.9 * (1 - 0.9**8) / (1 - 0.9**t), v * 0.99 * (1 - 0.99**8) / (1 - 0.99**t)
    rho_inf, bc2 = 199.0, 1 - 0.99**t
    rho = rho_inf - 2 * t * 0.99**t / bc2
    rect = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    step = 0.01 * rect * m / (v.sqrt() + 0.1 / bc2**0.5)
    torch.testing.assert_close(params[0].double(), before - step, rtol=0, atol=2e-7)  # an ulp at 1 and its half


def lookahead_of_timm(steps: int) -> dict[str, Any]:
    """timm's checkpoint within the first k = 6 steps, before there are slow weights; its RAdam's counters are ints."""
    state_dict = copy.deepcopy(RECORDS["timm-lookahead-radam"]["state_dict"])
    for group in state_dict["param_groups"]:
        group.update(lookahead_step=steps, weight_decay=0)
    for states in state_dict["state"].values():
        del states["lookahead_slow_buff"]
    return state_dict


def test_timms_late_slow_weights_are_said() -> None:
    """Within the first k steps: its synchronisation at step k would have done nothing."""
    params = parameters()
    optimizer = fastopt.Lookahead(fastopt.RAdam(in_groups(params, {})), k=2)
    with pytest.warns(UserWarning, match="first synchronisation, at step 6, only starts the slow weights"):
        assert fastopt.import_state(optimizer, lookahead_of_timm(5)).source == "timm"
    before = params[0].detach().clone()
    advance(optimizer, params, 5, 6)
    slow = optimizer.state[params[0]]["slow_param"]
    assert torch.equal(params[0].detach(), slow)
    assert not torch.equal(slow, before)


def test_timms_missing_slow_weights_of_one_parameter_are_said() -> None:
    state_dict = copy.deepcopy(RECORDS["timm-lookahead-adamw"]["state_dict"])
    del state_dict["state"][1]["lookahead_slow_buff"]
    optimizer = fastopt.Lookahead(fastopt.AdamW(in_groups(parameters(), {})))
    with pytest.warns(UserWarning, match="for which that was yet to come"):
        fastopt.import_state(optimizer, state_dict)


def test_slow_weights_of_older_pytorch_optimizers_are_keyed_by_parameter() -> None:
    record = copy.deepcopy(RECORDS["kozistr-lookahead-adamw"])
    slow = record["state_dict"]["lookahead_state"]
    keyed = {torch.nn.Parameter(torch.zeros(SHAPES[i])): own for i, own in enumerate(slow.values())}
    record["state_dict"]["lookahead_state"] = keyed
    after, _ = continued(by_name["kozistr-lookahead-adamw"], record)
    assert (after - record["after"]).abs().max().item() <= tolerance(record["after"])


@pytest.mark.parametrize(("name", "text"), [("kozistr-radam", "RAdam waits"), ("kozistr-ranger-3", "Ranger ascends")])
def test_steps_before_rectification_are_said_to_differ(name: str, text: str) -> None:
    state_dict = copy.deepcopy(RECORDS[name]["state_dict"])
    for group in state_dict["param_groups"]:
        group.update(step=4, weight_decay=0)
    cls, kwargs = (fastopt.RAdam, {}) if name == "kozistr-radam" else (fastopt.Ranger, {"degenerated_to_sgd": False})
    with pytest.warns(UserWarning, match=text):
        fastopt.import_state(cls(in_groups(parameters(), {}), **kwargs), state_dict)


def test_lookahead_around_an_optimizer_of_torch_takes_checkpoints_too() -> None:
    peer = by_name["timm-lookahead-adamw"]
    foreign = Peer(**(vars(peer) | {"ours": lambda g: fastopt.Lookahead(torch.optim.AdamW(g))}))
    assert_continues(foreign, RECORDS[peer.id])


def test_inner_checkpoint_into_lookahead_starts_slow_weights_afresh() -> None:
    peer, record = by_name["optimi-adam"], RECORDS["optimi-adam"]
    wrapped = Peer(**(vars(peer) | {"ours": lambda g: fastopt.Lookahead(peer.ours(g), k=1000)}))
    after, report = continued(wrapped, record)
    assert (after - record["after"]).abs().max().item() <= tolerance(record["after"])
    assert "lookahead_k" not in report.assumed
    params = parameters()
    stepped = fastopt.Lookahead(fastopt.Adam(in_groups(params, {})))
    advance(stepped, params, 0, 3)
    with pytest.warns(UserWarning, match="gradient"):
        fastopt.import_state(stepped, record["state_dict"])
    assert [g["lookahead_step"] for g in stepped.param_groups] == [0, 0]


def _groups(**changes: Any) -> Change:
    return lambda state_dict: [g.update(changes) for g in state_dict.get("base_optimizer", state_dict)["param_groups"]]


def _without_group_key(key: str) -> Change:
    return lambda state_dict: [g.pop(key) for g in state_dict["param_groups"]]


def _states(**changes: Any) -> Change:
    return lambda state_dict: [
        s.update(changes) for s in state_dict.get("base_optimizer", state_dict)["state"].values()
    ]


def _slow(**changes: Any) -> Change:
    return lambda state_dict: [s.update(changes) for s in state_dict["lookahead_state"].values()]


def _nothing(state_dict: dict[str, Any]) -> None:
    pass


def _of(name: str, **kwargs: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: getattr(fastopt, name)(groups, **kwargs)


def _in_lookahead(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: fastopt.Lookahead(getattr(fastopt, name)(groups))


REFUSED: dict[str, tuple[str, Change, Callable[[Any], torch.optim.Optimizer], str]] = {
    "ranger-into-radam": ("optimi-ranger", _nothing, _of("RAdam"), "not saved by a RAdam, for it has alpha, k"),
    "radam-into-ranger": ("optimi-radam", _nothing, _of("Ranger"), "not saved by a Ranger, for it lacks alpha, k"),
    "adam-into-sgd": ("optimi-adam", _nothing, _of("SGD", momentum=0.9), "for it lacks dampening, momentum"),
    "no-counterpart": ("optimi-adam", _nothing, _of("NAdam"), "NAdam has no counterpart there; accepted: SGD, Adam"),
    "coupled-into-adamw": ("optimi-adam", _nothing, _of("AdamW"), "acts on the gradient, which AdamW cannot do"),
    "decoupled-into-sgd": ("optimi-sgd", _groups(decouple_wd=True), _of("SGD"), "acts on the parameter itself"),
    "coupled-into-ranger": ("optimi-ranger", _groups(decouple_wd=False), _of("Ranger"), "acts on the gradient"),
    "fixed-decay": ("kozistr-radam", _groups(fixed_decay=True), _of("RAdam"), "fixed_decay=True"),
    "adanorm": ("kozistr-radam", _groups(adanorm=True), _of("RAdam"), "adanorm=True"),
    "adam-debias": ("kozistr-ranger", _groups(adam_debias=True), _of("Ranger"), "adam_debias=True"),
    "no-decay-at-all": ("kozistr-radam", _groups(weight_decouple=False), _of("RAdam"), "4.1.0 does not decay"),
    "coupled-kozistr": ("kozistr-ranger", _groups(weight_decouple=False), _of("Ranger"), "acts on the gradient"),
    "saved-in-evaluation": (
        "kozistr-lookahead-adamw", _slow(backup_params=torch.zeros(1)), _in_lookahead("AdamW"), "clear_and_load_backup",
    ),
    "pullback": (
        "kozistr-lookahead-adamw", _slow(slow_momentum=torch.zeros(1)), _in_lookahead("AdamW"), "pullback_momentum",
    ),
    "damaged": (
        "kozistr-lookahead-adamw", lambda s: s["lookahead_state"].pop((0, 0)), _in_lookahead("AdamW"), "damaged",
    ),
    "k-too-small": (
        "kozistr-lookahead-adamw", _nothing, lambda g: fastopt.Lookahead(fastopt.AdamW(g), k=3), "counted 3 steps",
    ),
    "kozistr-lookahead-into-inner": ("kozistr-lookahead-adamw", _nothing, _of("AdamW"), r"Lookahead\(fastopt.AdamW"),
    "timm-lookahead-into-inner": ("timm-lookahead-radam", _nothing, _of("RAdam"), r"fastopt.Lookahead\(fastopt.RAdam"),
    "inner-of-another-rule": ("timm-lookahead-adamw", _nothing, _in_lookahead("Adamax"), "it has amsgrad"),
    "caution": ("timm-adamw", _groups(caution=True), _of("AdamW"), "caution=True"),
    "clipped": ("timm-adamw", _groups(clipping_threshold=1.0), _of("AdamW"), "clipping_threshold=1.0"),
    "adamw-into-radam": ("timm-adamw", _nothing, _of("RAdam"), "not saved by a RAdam, for it has amsgrad"),
    "threshold": ("ranger-4", _groups(N_sma_threshhold=3), _of("Ranger"), "Invalid n_sma_threshold value: 3"),
    "into-another-class": ("ranger-4", _nothing, _of("RAdam"), "RAdam has no counterpart there; accepted: Ranger"),
    "missing-state": ("optimi-adam", lambda s: s["state"][1].pop("exp_avg_sq"), _of("Adam"), "exp_avg_sq"),
    "foreign-state": ("kozistr-radam", _states(previous_grad=torch.zeros(1)), _of("RAdam"), "no use for them"),
    "no-tensor": ("kozistr-radam", _states(exp_avg=3.0), _of("RAdam"), "'exp_avg' is a float, not a tensor"),
    "shape": ("kozistr-radam", _states(exp_avg=torch.zeros(7)), _of("RAdam"), r"has shape \(7,\), the parameter has"),
    "slow-shape": (
        "timm-lookahead-adamw", _states(lookahead_slow_buff=torch.zeros(7)), _in_lookahead("AdamW"), r"shape \(7,\)",
    ),
    "sizes": (
        "optimi-adam", lambda s: s["param_groups"][1]["params"].pop(), _of("Adam"), r"groups have \[1, 1\] .* \[1, 2\]",
    ),
    "group-count": ("optimi-adam", lambda s: s["param_groups"].pop(), _of("Adam"), r"groups have \[1\] param"),
    "no-lr-for-the-rule": ("optimi-adam", _without_group_key("eps"), _of("Adam"), "lacks eps"),
}  # fmt: skip


@pytest.mark.contract("import", optimizers="any")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_continue_is_refused_before_anything_changes(what: str) -> None:
    name, change, make, text = REFUSED[what]
    state_dict = copy.deepcopy(RECORDS[name]["state_dict"])
    change(state_dict)
    params, twins = parameters(), parameters()
    optimizer, undisturbed = make(in_groups(params, {})), make(in_groups(twins, {}))
    advance(optimizer, params, 0, 3)
    advance(undisturbed, twins, 0, 3)
    with pytest.raises(ValueError, match=text):
        fastopt.import_state(optimizer, state_dict, by_name[name].source)
    assert optimizer.state_dict()["param_groups"] == undisturbed.state_dict()["param_groups"]
    want = advance(undisturbed, twins, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(advance(optimizer, params, 3, 6), want, strict=True))


def test_decay_that_ranger2020_scales_is_refused() -> None:
    state_dict = copy.deepcopy(RECORDS["ranger2020"]["state_dict"])
    _groups(weight_decay=0.1)(state_dict)
    optimizer = fastopt.Ranger(in_groups(parameters(), {}))
    with pytest.raises(ValueError, match="'ranger' or 'ranger2020'"):
        fastopt.import_state(optimizer, state_dict)
    with pytest.raises(ValueError, match="scales decay by the rectified step"):
        fastopt.import_state(optimizer, state_dict, "ranger2020")
    fastopt.import_state(optimizer, state_dict, "ranger")
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_what_is_no_checkpoint_is_named() -> None:
    params = parameters()
    optimizer = fastopt.Adam(params)
    inside = {"model": {}, "optimizer": optimizer.state_dict(), "epoch": 3}
    with pytest.raises(ValueError, match=r"this has epoch, model, optimizer\. There is one under 'optimizer'"):
        fastopt.import_state(optimizer, inside)
    with pytest.raises(TypeError, match="state_dict is a Adam"):
        fastopt.import_state(optimizer, optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="addresses in a process that is gone"):
        fastopt.import_state(optimizer, {"fast_state": {}, "slow_state": {}, "param_groups": []})
    with pytest.raises(ValueError, match="'nonsense' is not known; accepted are 'torch', 'ranger'"):
        fastopt.import_state(optimizer, optimizer.state_dict(), "nonsense")
    bare = {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.9), "eps": 0.1, "params": [0, 1, 2]}]}
    with pytest.raises(ValueError, match="does not show which library wrote it"):
        fastopt.import_state(optimizer, bare)


def test_only_optimizers_of_fastopt_take_checkpoints() -> None:
    state_dict = torch.optim.Adam(parameters()).state_dict()
    for optimizer in (torch.optim.Adam(parameters()), fastopt.Lookahead(torch.optim.Adadelta(parameters()))):
        with pytest.raises(TypeError, match=r"torch\.optim|Lookahead"):
            fastopt.import_state(optimizer, state_dict)
