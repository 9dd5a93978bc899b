"""`fastopt.compare`: finds what is there to find, says when it is chance, and survives what users bring."""

import copy
import csv
import doctest
import itertools
import math
import sys
from array import array
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastopt
from fastopt import report
from fastopt.__main__ import main
from fastopt.tools import noise, tasks
from fastopt.tools.compare import compare
from fastopt.tools.comparison import Comparison, Run
from fastopt.tools.entrants import default_names, entrants, split_names

DATA = torch.randn(256, 5, generator=torch.Generator().manual_seed(3))
PNG = b"\x89PNG"


def make_model() -> nn.Module:
    return nn.Linear(5, 1)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()


def evaluate(model: nn.Module) -> float:
    return loss(model, DATA).item()


def shuffled(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield DATA[torch.randint(len(DATA), (16,), generator=generator)]


def quick(**options: object) -> Comparison:
    settings = {"optimizers": ["SGD"], "lrs": [0.1], "seeds": 2, "steps": 20, "progress": False, **options}
    return compare(make_model, loss, shuffled, evaluate, **settings)


def synthetic(scores: dict[str, dict[float, list[float]]], **options: object) -> Comparison:
    """A comparison of given scores by optimizer and lr; NaN stands for a diverged run."""
    runs = [
        Run(name, lr, seed, score, {"score": score}, array("d", [1.0]), 1 if math.isnan(score) else None, 0.0)
        for name, by_lr in scores.items()
        for lr, of_seeds in by_lr.items()
        for seed, score in enumerate(of_seeds)
    ]
    return Comparison(tuple(runs), steps=1, **options)


class TestFinds:
    def test_a_learning_rate_that_does_nothing_loses(self):
        result = quick(lrs=[1e-30, 0.1])
        assert result.best.lr == 0.1
        stuck, trained = ([run.score for run in result.runs if run.lr == lr] for lr in (1e-30, 0.1))
        assert min(stuck) > 10 * max(trained)

    def test_an_optimizer_that_does_nothing_is_worse_beyond_noise(self):
        def frozen(params, lr):
            return torch.optim.SGD(params, lr=0.0)

        result = quick(optimizers={"working": "SGD", "frozen": frozen}, seeds=3)
        working, stuck = result.standings
        assert (working.optimizer, stuck.optimizer) == ("working", "frozen")
        assert result.verdict(stuck) == "worse"
        assert stuck.behind > stuck.noise > 0
        assert "Worse, beyond the noise (95% confidence): frozen" in str(result)

    def test_identical_optimizers_are_within_noise(self):
        result = quick(optimizers={"one": torch.optim.SGD, "two": torch.optim.SGD}, seeds=3)
        assert result.standings[0].scores == result.standings[1].scores
        assert result.standings[1].behind == 0
        assert result.verdict(result.standings[1]) == "within noise"

    def test_without_a_grid_it_searches_until_the_best_is_inside(self):
        result = quick(lrs=None, steps=60)
        (sgd,) = result.standings
        assert sgd.edge == ""
        assert len(sgd.lrs) > 3, "the default of SGD, 1e-3, is far too small here, so the grid had to grow"
        assert sgd.lrs == tuple(sorted(sgd.lrs))

    def test_higher_is_better(self):
        def score(model):
            return -evaluate(model)

        result = compare(
            make_model, loss, shuffled, score, optimizers=["SGD"], lrs=[1e-30, 0.1], steps=20, higher_is_better=True,
            progress=False,
        )  # fmt: skip
        assert result.best.lr == 0.1

    def test_without_evaluate_the_score_is_the_loss_on_the_batches_that_follow(self):
        result = compare(make_model, loss, shuffled, optimizers=["SGD"], lrs=[1e-30], seeds=1, steps=20, progress=False)
        torch.manual_seed(0)
        model = make_model()
        batches = [batch for batch, _ in zip(shuffled(0), range(22), strict=False)]
        with torch.no_grad():
            expected = sum(loss(model, batch).item() for batch in batches[20:]) / 2
        assert result.best.mean == expected
        assert result.score_name == "loss"

    def test_lookahead_is_scored_on_its_slow_weights(self):
        result = quick(optimizers=["Lookahead(SGD, k=1000)"], seeds=1)
        torch.manual_seed(0)
        assert result.best.mean == evaluate(make_model()), (
            "before the first synchronisation the slow weights are the first"
        )

    def test_every_seed_is_the_same_start_and_order_for_all_and_repeats(self):
        first, again = (quick(optimizers=["SGD", "Adam"], lrs=[1e-30]) for _ in range(2))
        sgd, adam = ([run.losses for run in first.runs if run.optimizer == name] for name in ("SGD", "Adam"))
        assert sgd == adam
        assert sgd[0] != sgd[1], "the two seeds differ"
        assert [run.losses for run in first.runs] == [run.losses for run in again.runs]

    def test_the_global_random_state_is_left_alone(self):
        torch.manual_seed(11)
        before = torch.get_rng_state()
        quick()
        assert torch.equal(before, torch.get_rng_state())


class TestDivergence:
    def test_is_counted_and_does_not_stop_the_others(self):
        result = quick(lrs=[0.1, 1e30], steps=40)
        diverged = [run for run in result.runs if run.diverged_at is not None]
        assert {run.lr for run in diverged} == {1e30}
        assert all(0 < run.diverged_at < 40 and math.isnan(run.score) for run in diverged)
        assert result.best.lr == 0.1
        assert "2 of 4 runs diverged" in str(result)

    def test_everywhere_is_said(self):
        result = quick(lrs=[1e30], steps=40)
        assert result.best.diverged == 2
        assert math.isnan(result.best.mean)
        assert "try smaller learning rates" in str(result)

    def test_of_a_loss_that_raises_on_bad_input_counts_too(self):
        def fussy(model, batch):
            probability = torch.sigmoid(model(batch) * 1e3)
            return nn.functional.binary_cross_entropy(probability, (batch.sum(dim=1, keepdim=True) > 0).float())

        def explode(params, lr):
            optimizer = torch.optim.SGD(params, lr=lr)
            optimizer.register_step_post_hook(lambda *_: [p.data.fill_(math.nan) for p in params])
            return optimizer

        result = compare(make_model, fussy, shuffled, optimizers=[explode], lrs=[0.1], steps=9, progress=False)
        assert [run.diverged_at for run in result.runs] == [1, 1, 1]

    def test_of_a_loss_that_raises_on_its_way_there_counts_too(self):
        """The weights are finite still when what is computed with them is not."""

        def make():
            return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

        def likelihood(model, batch):
            x, y = batch
            if not (mean := model(x)).isfinite().all():
                finite.append(all(p.isfinite().all() for p in model.parameters()))
            return -torch.distributions.Normal(mean, 1.0).log_prob(y).mean()

        finite = []
        x = torch.randn(64, 4)
        data = [(x, x.sum(1, keepdim=True))]
        result = compare(make, likelihood, data, optimizers=["SGD"], seeds=5, steps=50, lrs=[30.0], progress=False)
        assert any(finite)
        assert len(result.runs) == 5
        assert all(run.diverged_at is not None and math.isnan(run.score) for run in result.runs)

    def test_does_not_hide_an_error_of_the_user(self):
        def broken(model, batch):
            raise RuntimeError("shapes do not match")

        with pytest.raises(RuntimeError, match="shapes do not match"):
            compare(make_model, broken, shuffled, optimizers=["SGD"], lrs=[0.1], progress=False)

    def test_a_setting_that_diverges_on_one_seed_loses_to_one_that_does_not(self):
        result = synthetic({"A": {0.1: [1.0, 1.1, 1.2], 1.0: [0.1, 0.1, math.nan]}, "B": {0.1: [0.2, math.nan, 0.2]}})
        assert [(it.optimizer, it.lr) for it in result.standings] == [("A", 0.1), ("B", 0.1)]
        assert result.verdict(result.standings[1]) == "diverged: 1 of 3"


class TestFailure:
    @pytest.mark.parametrize(
        ("fails", "reason"),
        [
            ("torch.SparseAdam", "RuntimeError: SparseAdam does not support dense gradients"),
            ("Adam(differentiable=True)", "RuntimeError: a leaf Variable"),
            ("Adam(capturable=True)", "AssertionError: If capturable=True"),
        ],
    )
    def test_of_one_optimizer_is_a_line_in_the_table_and_the_others_are_kept(self, fails, reason, tmp_path):
        result = quick(optimizers=[fails, "SGD", "Adam"], lrs=[0.01, 0.1])
        assert result.best.optimizer in ("SGD", "Adam")
        assert len(result.runs) == 1 + 2 * 2 * 2, "the first error ends that one"
        failed = result.standings[-1]
        assert (failed.optimizer, failed.scores, failed.edge) == (fails, (), "")
        assert result.verdict(failed).startswith(f"failed: {reason}")
        assert max(map(len, result.table().splitlines())) < 200
        assert f"{fails} failed at lr 0.01: {reason}" in str(result)
        result.to_csv(tmp_path / "runs.csv")
        with (tmp_path / "runs.csv").open(newline="") as file:
            assert [row["failed"].startswith(reason) for row in csv.DictReader(file)] == [True] + 8 * [False]
        result.plot(tmp_path / "plot.png")

    def test_of_one_is_no_rival_in_the_correction_for_several(self):
        alone = quick(optimizers=["SGD", "Adam"])
        beside = quick(optimizers=["SGD", "Adam", "torch.SparseAdam"])
        assert beside.standings[1].noise == alone.standings[1].noise

    def test_after_successes_still_counts(self):
        def fragile(params, lr):
            if lr == 0.2:
                raise KeyError("no such\nrate")
            return torch.optim.SGD(params, lr=lr)

        result = quick(optimizers=[fragile, "Adam"], lrs=[0.1, 0.2, 0.3])
        assert result.verdict(result.standings[-1]) == r"failed: KeyError: 'no such\nrate'"
        assert result.standings[-1].lrs == (0.1, 0.2)

    def test_of_a_step_after_the_weights_have_grown_beyond_measure_is_divergence(self):
        def late(params, lr):
            def fail(*_):
                if not all(parameter.isfinite().all() for parameter in params):
                    raise RuntimeError("not finite")

            optimizer = torch.optim.SGD(params, lr=lr)
            optimizer.register_step_pre_hook(lambda *_: [p.data.fill_(math.nan) for p in params] and None)
            optimizer.register_step_pre_hook(fail)
            return optimizer

        assert quick(optimizers=[late], seeds=1).best.diverged == 1

    def test_of_all_is_an_error_with_the_reasons(self):
        with pytest.raises(RuntimeError, match=r"every optimizer failed:\n  torch.SparseAdam(.|\n)*Adam\(capturable"):
            quick(optimizers=["torch.SparseAdam", "Adam(capturable=True)"])

    def test_of_a_function_of_the_user_names_the_run_and_keeps_its_type(self):
        class OddError(Exception):
            def __init__(self, code, detail):
                super().__init__(code, detail)

        def raised(error, kind):
            def broken(model, batch):
                if next(calls) == 3:
                    raise error
                return loss(model, batch)

            calls = itertools.count(1)
            with pytest.raises(kind) as info:
                compare(make_model, broken, shuffled, optimizers=["SGD"], lrs=[0.1], progress=False)
            assert info.value.__cause__ is error
            return info.value.args

        assert raised(ZeroDivisionError("oh"), ZeroDivisionError) == ("SGD at lr 0.1, seed 0, step 3: oh",)
        assert raised(KeyError("oh"), KeyError) == ("SGD at lr 0.1, seed 0, step 3: 'oh'",)
        assert raised(OddError(1, 2), RuntimeError) == ("SGD at lr 0.1, seed 0, step 3: OddError: (1, 2)",)

    def test_of_the_evaluation_names_the_run(self):
        def broken(model):
            raise IndexError("far")

        with pytest.raises(IndexError, match=r"SGD at lr 0.1, seed 0, evaluation after step 5: far"):
            compare(make_model, loss, shuffled, broken, optimizers=["SGD"], lrs=[0.1], steps=5, progress=False)

    def test_an_interrupt_leaves_what_was_finished(self):
        def stop(params, lr):
            optimizer = torch.optim.SGD(params, lr=lr)
            optimizer.register_step_pre_hook(interrupt)
            return optimizer

        def interrupt(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as info:
            quick(optimizers=["SGD", stop])
        assert info.value.result.best.optimizer == "SGD"
        with pytest.raises(KeyboardInterrupt) as info:
            quick(optimizers=[stop, "SGD"])
        assert "nothing to compare" in str(info.value.result)


class TestNoise:
    # Student's t at two-sided 95 %, from any printed table.
    @pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (58, 2.002)])
    def test_quantile_is_that_of_the_tables(self, freedom, t):
        assert noise.student_quantile(0.05, freedom) == pytest.approx(t, abs=6e-4)

    def test_half_width_by_hand(self):
        # Variances 1 and 4, three values each: pooled 2.5, standard error sqrt(2.5 * 2 / 3), 4 degrees of freedom.
        width = noise.half_width([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
        assert width == pytest.approx(2.77645 * math.sqrt(2.5 * 2 / 3), rel=1e-5)

    @pytest.mark.parametrize("module", ["fastopt.tools.compare", "fastopt.tools.noise"])
    def test_docstring_examples_run(self, module):
        assert doctest.testmod(sys.modules[module]).failed == 0

    def test_several_rivals_need_a_larger_difference(self):
        samples = [1.0, 2.0, 3.0], [2.0, 3.0, 5.0]
        widths = [noise.half_width(*samples, comparisons=count) for count in (1, 2, 11)]
        assert widths == sorted(widths)
        # 5 % shared by two rivals is Student's t at 97.5 %, which is 3.495 with 4 degrees of freedom.
        assert widths[1] / widths[0] == pytest.approx(3.4954 / 2.77645, rel=1e-4)

    def test_is_unknown_with_one_seed_and_nothing_without_spread(self):
        assert math.isnan(noise.half_width([1.0], [2.0, 3.0]))
        assert noise.half_width([1.0, 1.0], [2.0, 2.0]) == 0

    def test_false_alarms_are_as_rare_as_promised(self):
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(2000, 2, 3, generator=generator, dtype=torch.float64)
        means = draws.mean(dim=2)
        apart = sum(
            abs(means[i, 0] - means[i, 1]).item() > noise.half_width(*draws[i].tolist()) for i in range(len(draws))
        )
        assert 0.035 < apart / len(draws) < 0.065, "5 % +- 3 standard errors of 2000 trials"

    def test_verdicts_of_known_scores(self):
        result = synthetic({
            "clear": {0.1: [5.0, 5.1, 4.9]},
            "best": {0.1: [1.0, 1.1, 0.9]},
            "near": {0.1: [1.05, 1.15, 0.95]},
        })  # fmt: skip
        assert {it.optimizer: result.verdict(it) for it in result.standings} == {
            "best": "best", "near": "within noise", "clear": "worse",
        }  # fmt: skip
        assert result.standings[2].behind == pytest.approx(4.0)

    def test_one_seed_says_that_it_cannot_tell(self):
        result = synthetic({"A": {0.1: [1.0]}, "B": {0.1: [2.0]}})
        assert result.verdict(result.standings[1]) == "noise unknown"
        assert "One seed cannot tell" in str(result)

    def test_the_winner_has_none_as_the_table_says(self):
        result = synthetic({"A": {0.1: [1.0, 2.0]}, "B": {0.1: [2.0, 4.0]}})
        assert math.isnan(result.best.noise)
        assert result.standings[1].noise > 0

    def test_nothing_is_behind_by_minus_zero(self):
        result = synthetic({"A": {0.1: [1.0, 2.0]}, "B": {0.1: [1.0, 2.0]}}, higher_is_better=True)
        assert "-0" not in result.table().splitlines()[-1].split()
        assert math.copysign(1, result.standings[1].behind) == 1

    def test_of_no_runs_nothing_is_said(self):
        nothing = Comparison((), 1)
        assert "nothing to compare" in str(nothing)
        with pytest.raises(ValueError, match="no runs"):
            _ = nothing.best

    @pytest.mark.parametrize(("best", "edge"), [(0.01, "lowest"), (0.1, ""), (1.0, "highest")])
    def test_the_end_of_the_grid_is_flagged(self, best, edge):
        result = synthetic({"A": {lr: [0.0 if lr == best else 1.0] for lr in (0.01, 0.1, 1.0)}})
        assert result.best.edge == edge
        assert ("widen the grid" in str(result)) == bool(edge)


class TestOutput:
    def test_csv_round_trip(self, tmp_path):
        result = quick(optimizers=["SGD", "Adam"], lrs=[0.1, 1e30], steps=40)
        result.to_csv(tmp_path / "runs.csv")
        with (tmp_path / "runs.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(result.runs) == 8
        for row, run in zip(rows, result.runs, strict=True):
            assert (row["optimizer"], int(row["seed"]), int(row["steps"])) == (run.optimizer, run.seed, 40)
            assert float(row["lr"]) == run.lr
            assert float(row["score"]) == run.score or math.isnan(run.score)
            assert row["diverged_at"] == ("" if run.diverged_at is None else str(run.diverged_at))

    def test_every_metric_is_recorded_and_the_first_one_ranks(self, tmp_path):
        def metrics(model):
            return {"error": evaluate(model), "bias": model.bias.item()}

        result = compare(make_model, loss, shuffled, metrics, optimizers=["SGD"], lrs=[0.1], steps=5, progress=False)
        result.to_csv(tmp_path / "runs.csv")
        header, first, *_ = (tmp_path / "runs.csv").read_text().splitlines()
        assert header.endswith("error,bias")
        assert float(first.split(",")[-2]) == result.runs[0].score
        assert "error" in result.table()

    @pytest.mark.parametrize("lrs", [[0.1], [0.01, 0.1, 1e30], [1e30]], ids=["one-lr", "some-diverge", "all-diverge"])
    def test_plot_is_a_picture(self, tmp_path, lrs):
        path = tmp_path / "plot.png"
        quick(optimizers=["SGD", "Adam"], lrs=lrs, steps=40).plot(path)
        assert path.read_bytes().startswith(PNG)
        assert path.stat().st_size > 10_000

    def test_table_has_a_line_for_each_optimizer(self):
        result = quick(optimizers=["SGD", "Adam"])
        lines = result.table().splitlines()
        assert len(lines) == 4
        assert lines[2].startswith(result.best.optimizer)
        assert lines[2].split()[5:7] == ["-", "-"], "the winner is not behind itself"

    def test_progress_falls_back_to_plain_lines_in_a_log(self, capsys):
        with report.Progress(100) as bar:
            for step in range(100):
                bar._due = 0.0
                bar.advance(f"loss {step}")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 11
        assert lines[-1].startswith("100%  100/100 steps  loss 99")

    def test_a_missing_extra_says_how_to_get_it(self):
        with pytest.raises(ModuleNotFoundError, match=r"drawing needs no_such_module.*pip install no_such_module"):
            report.need("no_such_module.inner", "drawing")


class TestOptimizers:
    def test_the_default_list_is_every_public_optimizer_and_all_of_them_train(self):
        names = default_names()
        assert {"SGD", "Adam", "AMSGrad", "RAdam", "Lookahead(Adam)", "Ranger"} <= set(names)
        public = [
            name
            for name in fastopt.__all__
            if isinstance(getattr(fastopt, name), type) and issubclass(getattr(fastopt, name), torch.optim.Optimizer)
        ]
        assert all(any(name in shown for shown in names) for name in public)
        result = quick(optimizers=None, lrs=[1e-3], seeds=1, steps=3)
        assert sorted(it.optimizer for it in result.standings) == sorted(names)
        assert all(run.diverged_at is None for run in result.runs)

    @pytest.mark.parametrize(
        ("text", "name", "cls"),
        [
            ("adam", "Adam", fastopt.Adam),
            ("amsgrad", "AMSGrad", fastopt.Adam),
            ("sgd(momentum=0.9, nesterov=True)", "SGD(momentum=0.9, nesterov=True)", fastopt.SGD),
            ("lookahead", "Lookahead(Adam)", fastopt.Lookahead),
            ("Lookahead(torch.radam, k=6)", "Lookahead(torch.RAdam, k=6)", fastopt.Lookahead),
            ("torch.adam(fused=True)", "torch.Adam(fused=True)", torch.optim.Adam),
        ],
    )
    def test_names_are_read(self, text, name, cls):
        (entrant,) = entrants([text])
        assert entrant.name == name
        optimizer = entrant.make([torch.zeros(2, requires_grad=True)], 0.25)
        assert type(optimizer) is cls
        assert optimizer.param_groups[0]["lr"] == 0.25
        if name == "AMSGrad":
            assert optimizer.param_groups[0]["amsgrad"]

    def test_classes_and_callables_are_taken(self):
        def mine(params, lr):
            return torch.optim.SGD(params, lr=lr, momentum=0.5)

        assert [entrant.name for entrant in entrants([torch.optim.Adadelta, mine])] == ["Adadelta", "mine"]

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
    def test_one_that_takes_only_some_shapes_is_tried_on_the_model(self):
        options = {"optimizers": ["torch.Muon"], "lrs": [0.01], "seeds": 1, "steps": 3, "progress": False}
        assert compare(lambda: nn.Linear(5, 1, bias=False), loss, shuffled, **options).best.scores
        with pytest.raises(ValueError, match=r"torch.Muon cannot be made for this model: ValueError: Muon only"):
            compare(make_model, loss, shuffled, **options)

    def test_one_that_chooses_among_the_parameters_is_tried_on_the_model(self):
        def matrices(params, lr):
            return torch.optim.SGD([param for param in params if param.ndim == 2], lr=lr)

        assert quick(optimizers=[matrices], steps=3).best.scores

    def test_commas_in_parentheses_do_not_split(self):
        assert split_names("adam, lookahead(sgd(momentum=0.9), k=5),sgd,") == [
            "adam", "lookahead(sgd(momentum=0.9), k=5)", "sgd",
        ]  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"optimizers": ["adm"]}, ValueError, "unknown optimizer 'adm': did you mean adam"),
            ({"optimizers": ["torch.nope"]}, ValueError, "unknown optimizer 'torch.nope'"),
            ({"optimizers": ["SGD(lr=0.1)"]}, ValueError, "lr comes from the grid"),
            ({"optimizers": ["SGD(0.9)"]}, ValueError, "options go by name"),
            ({"optimizers": ["SGD(momentum=open)"]}, ValueError, "options must be plain values"),
            ({"optimizers": ["Lookahead(k=5)"]}, ValueError, "Lookahead wraps one other"),
            ({"optimizers": ["SGD("]}, ValueError, "cannot read the optimizer"),
            ({"optimizers": ["SGD(momentum=-1)"]}, ValueError, "Invalid momentum value"),
            ({"optimizers": "SGD"}, TypeError, r"write \['SGD'\]"),
            ({"optimizers": []}, ValueError, "name at least one"),
            ({"optimizers": ["SGD", "sgd"]}, ValueError, "share the name 'SGD'"),
            ({"optimizers": [3]}, TypeError, "got int: 3"),
            ({"optimizers": [nn.Linear]}, TypeError, "derived from torch.optim.Optimizer; got Linear"),
            ({"optimizers": [fastopt.Lookahead]}, TypeError, r"such as 'Lookahead\(Adam\)'"),
            ({"optimizers": "adam, sgd"}, TypeError, r"write \['adam', 'sgd'\]"),
            ({"optimizers": [lambda params, lr: None]}, TypeError, "returns an Optimizer"),
            ({"optimizers": [torch.optim.LBFGS]}, TypeError, r"LBFGS cannot be compared: its step\(\) evaluates"),
            ({"lrs": []}, ValueError, "at least one"),
            ({"lrs": 0.1}, TypeError, r"write \[0.1\]"),
            ({"lrs": [0.1, -1.0]}, ValueError, "positive"),
            ({"seeds": 0}, ValueError, "at least 1"),
            ({"seeds": 2.0}, TypeError, "seeds is a count, or a list of seeds; got 2.0"),
            ({"seeds": [1, 1]}, ValueError, "different"),
            ({"steps": 0}, ValueError, "steps must be at least 1"),
            ({"steps": 2.5}, TypeError, "steps is a whole number; got 2.5"),
            ({"loss": 3}, TypeError, r"loss is a function \(model, batch\) -> scalar; got 3"),
            ({"evaluate": 3}, TypeError, "evaluate is a function of the model, or None; got 3"),
            ({"batches": 3}, TypeError, "batches is an iterable, or a function from the seed to one; got 3"),
            ({"seeds": [0, 1.5]}, TypeError, r"seeds are whole numbers; got \[0, 1.5\]"),
            ({"confidence": "a"}, ValueError, "confidence is a probability between 0 and 1; got 'a'"),
            ({"optimizers": 3}, TypeError, r"optimizers must be a list or a mapping from names; got 3: write \[3\]"),
            ({"optimizers": ["Adam(foreach=True, fused=True)"]}, ValueError, "cannot both be|cannot be"),
            ({"optimizers": {1: "SGD"}}, TypeError, "the keys of optimizers are names for the table; got 1"),
            ({"confidence": 95}, ValueError, "between 0 and 1"),
            ({"higher_is_better": True}, ValueError, "higher_is_better=True needs evaluate="),
            ({"optimizers": ["adam(betas=0.9)"]}, TypeError, r"Adam\(betas=0.9\) cannot be made.*not subscriptable"),
            ({"lrs": {"Adam": [0.1]}}, TypeError, "lrs is one list of learning rates for all optimizers"),
            ({"lrs": ["fast"]}, TypeError, r"lrs is a list of numbers; got \['fast'\]"),
            ({"optimizers": ["adam", "adam"]}, ValueError, "share the name 'Adam': leave one out"),
        ],
        ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
    )
    def test_is_refused_before_any_training(self, options, error, message):
        def never(model, batch):
            raise AssertionError("trained")

        settings = {"loss": never, "batches": shuffled, "optimizers": ["SGD"], "lrs": [0.1], "progress": False}
        with pytest.raises(error, match=message):
            compare(make_model, **settings | options)

    def test_batches_that_cannot_start_over(self):
        with pytest.raises(TypeError, match="read only once"):
            compare(make_model, loss, iter(DATA.split(16)), optimizers=["SGD"], lrs=[0.1], progress=False)
        with pytest.raises(ValueError, match="batches ended after 16 in a run of 300 steps"):
            compare(make_model, loss, lambda seed: iter(DATA.split(16)), optimizers=["SGD"], lrs=[0.1], progress=False)

    def test_a_model_instead_of_a_function(self):
        with pytest.raises(TypeError, match="lambda: Net"):
            compare(make_model(), loss, shuffled, progress=False)

    @pytest.mark.parametrize("copied", [lambda it: it, copy.copy, nn.Sequential])
    def test_the_same_model_again_and_again(self, copied):
        model = make_model()
        with pytest.raises(ValueError, match=r"make_model\(\), called twice, returned.*copy.deepcopy\(model\)"):
            compare(lambda: copied(model), loss, shuffled, progress=False)

    def test_memory_shared_by_other_parameters(self):
        weight = torch.zeros(1, 5)

        def make():
            model = make_model()
            model.weight = nn.Parameter(weight)
            return model

        with pytest.raises(ValueError, match="returned models that share parameters"):
            compare(make, loss, shuffled, progress=False)

    def test_a_frozen_part_may_be_shared(self):
        backbone = nn.Linear(5, 5).requires_grad_(False)
        options = {"optimizers": ["SGD"], "lrs": [0.1], "steps": 2, "progress": False}
        assert compare(lambda: nn.Sequential(backbone, make_model()), loss, shuffled, **options).best.scores

    def test_nothing_to_train(self):
        with pytest.raises(ValueError, match="without a parameter that requires a gradient"):
            compare(lambda: make_model().requires_grad_(False), loss, shuffled, progress=False)
        with pytest.raises(TypeError, match=r"returned a str: it must return a torch.nn.Module"):
            compare(lambda: "model", loss, shuffled, progress=False)

    @pytest.mark.parametrize(
        ("returned", "what"),
        [
            (None, "NoneType"),
            ((1.0, 2.0), "tuple"),
            ("0.5", "str"),
            ({"acc": "high"}, "str for 'acc'"),
            (torch.zeros(2), r"Tensor of shape \(2,\)"),
        ],
    )
    def test_an_evaluation_that_is_no_number(self, returned, what):
        with pytest.raises(TypeError, match=rf"evaluate\(model\) returned a {what}: it must return a number"):
            compare(
                make_model, loss, shuffled, lambda model: returned, optimizers=["SGD"], lrs=[0.1], steps=1,
                progress=False,
            )  # fmt: skip

    @pytest.mark.parametrize(
        ("wrong", "error", "message"),
        [
            (lambda model, x: loss(model, x).detach(), ValueError, "a tensor without a gradient: compute it from"),
            (lambda model, x: loss(model, x) * 1j, TypeError, "a complex number: it must be real"),
        ],
    )
    def test_a_loss_that_cannot_be_minimised(self, wrong, error, message):
        with pytest.raises(error, match=message):
            compare(make_model, wrong, shuffled, optimizers=["SGD"], lrs=[0.1], progress=False)

    @pytest.mark.parametrize("wrong", [lambda model, x: 1.0, lambda model, x: model(x)])
    def test_a_loss_that_is_none(self, wrong):
        with pytest.raises(TypeError, match="must return a tensor with one element"):
            compare(make_model, wrong, shuffled, optimizers=["SGD"], lrs=[0.1], progress=False)

    def test_a_data_loader_starts_over(self):
        loader = torch.utils.data.DataLoader(DATA, batch_size=64, shuffle=True)
        first, again = (
            compare(make_model, loss, loader, optimizers=["SGD"], lrs=[0.1], seeds=2, steps=9, progress=False)
            for _ in range(2)
        )
        assert [run.losses for run in first.runs] == [run.losses for run in again.runs]


class TestTasks:
    @pytest.mark.parametrize("name", tasks.TASKS)
    def test_repeats_to_the_bit_and_differs_by_seed(self, name):
        task = tasks.get(name)
        state = torch.get_rng_state()
        one, same, other = (task.make_model(seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert not all(torch.equal(one[key], other[key]) for key in one)
        (x, y), (x_same, y_same), (x_other, _) = (next(task.batches(seed)) for seed in (0, 0, 1))
        assert torch.equal(x, x_same)
        assert torch.equal(y, y_same)
        assert not torch.equal(x, x_other)
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize(("name", "lr", "gain"), [("digits", 1e-2, 1.5), ("chars", 3e-3, 2.0)])
    def test_can_be_learned(self, name, lr, gain):
        task = tasks.get(name)
        model = task.make_model(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        before = next(iter(task.evaluate(model).values()))
        for _, batch in zip(range(60), task.batches(0), strict=False):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        assert next(iter(task.evaluate(model).values())) < before - gain
        assert model.training, "evaluating restored the mode"

    def test_an_unknown_one_lists_those_there_are(self):
        with pytest.raises(ValueError, match="unknown task 'mnist': the tasks are digits, chars"):
            tasks.get("mnist")


class TestCommand:
    def test_compare_writes_its_files_and_prints_the_winner(self, tmp_path, capsys):
        status = main([
            "compare", "--task", "digits", "--optimizers", "sgd(momentum=0.9), adam", "--lrs", "1e-30,1e-2",
            "--seeds", "2", "--steps", "20", "--out", str(tmp_path / "out"),
        ])  # fmt: skip
        printed = capsys.readouterr().out
        assert status == 0
        assert "at lr 0.01 did best: test_loss" in printed
        assert len((tmp_path / "out" / "compare.csv").read_text().splitlines()) == 1 + 2 * 2 * 2
        assert (tmp_path / "out" / "compare.png").read_bytes().startswith(PNG)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["compare", "--optimizers", "adm"], "unknown optimizer 'adm'"),
            (["compare", "--task", "mnist"], "unknown task 'mnist'"),
            (["compare", "--lrs", "fast"], "--lrs=fast: accepted are numbers separated by commas"),
            (["compare", "--threads", "0"], "threads must be at least 1"),
            (["compare", "--threads", "100000"], "threads must be at most"),
            (["compare", "--optimizers", "adam,adam"], "share the name 'Adam': leave one out"),
            (["compare", "--optimizers", "torch.sparseadam", "--steps", "1"], "every optimizer failed"),
            (["compare", "--out", "/proc/no/such"], "/proc/no"),
        ],
    )
    def test_a_mistake_is_a_sentence_not_a_traceback(self, arguments, message, capsys):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err

    def test_help_names_the_optimizers(self, capsys):
        with pytest.raises(SystemExit):
            main(["compare", "-h"])
        printed = " ".join(capsys.readouterr().out.split())
        assert ", ".join(default_names()) in printed

    def test_a_file_in_the_way_is_known_before_the_training(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "compare.csv").mkdir()
        monkeypatch.setattr("fastopt.tools.compare.compare", lambda *args, **kwargs: pytest.fail("trained"))
        assert main(["compare", "--out", str(tmp_path)]) == 2
        assert "compare.csv cannot be written" in capsys.readouterr().err

    def test_an_interrupt_shows_what_was_finished(self, capsys, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(torch.optim.Adam, "step", interrupt)
        arguments = ["--optimizers", "sgd, torch.adam", "--lrs", "0.1", "--seeds", "1", "--steps", "2"]
        assert main(["compare", *arguments]) == 130
        printed = capsys.readouterr()
        assert "SGD at lr 0.1 did best" in printed.out
        assert "interrupted" in printed.err

    def test_info_prints(self, capsys):
        assert main(["info"]) == 0
        assert str(fastopt.info()) in capsys.readouterr().out

    def test_a_missing_library_for_the_picture_is_known_before_the_training(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setattr("fastopt.tools.compare.compare", lambda *args, **kwargs: pytest.fail("trained"))
        assert main(["compare", "--out", str(tmp_path)]) == 2
        assert "needs matplotlib" in capsys.readouterr().err

    def test_a_backend_that_cannot_run_is_a_sentence(self, capsys, monkeypatch):
        monkeypatch.setenv("FASTOPT_BACKEND", "triton")
        assert main(["compare", "--optimizers", "adam", "--lrs", "1e-3,", "--steps", "1", "--seeds", "1"]) == 2
        assert "'triton' was asked for" in capsys.readouterr().err

    def test_version(self, capsys):
        with pytest.raises(SystemExit):
            main(["--version"])
        assert capsys.readouterr().out == f"fastopt {fastopt.__version__}\n"
