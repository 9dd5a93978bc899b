"""The benchmark itself: its records, its tables, its method. Nothing here asserts a time."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastopt
from bench import allocations, commits, cpu_tables, peers, streams, study, training
from bench.__main__ import main
from bench.cases import CASES, CURVES, Case, Goal, Workload, Yardstick, matches, tensors
from bench.contenders import OURS, Contender, ours, public_rules, rivals
from bench.cpu import Field, jobs, measure_case
from bench.cpu_tables import markdown
from bench.gpu import jobs as gpu_jobs
from bench.gpu_cases import GPU_CASES
from bench.gpu_run import Process, Run
from bench.gpu_tables import UNMEASURED, gpu_markdown
from bench.models import MODELS, scaled
from bench.peers import ForeachRanger, rectify
from bench.race import Agreement, Samples, Spread, agreement, order, race
from bench.records import COLUMNS, ROOT, Environment, Row, append, read
from bench.report import CLOSING, ELSEWHERE, GPU_BLOCKS, OPENING, bodies, pages, with_blocks, write
from bench.rules import MIXES, RULES
from bench.streams import STRIPPED
from bench.sweep.__main__ import SOURCE, nvcc, summary
from bench.tables import Results
from bench.workload import OptimizerRunner, Tensors, leave_group

native = pytest.mark.skipif(not fastopt.backends.available("native"), reason=str(fastopt.backends.why_not("native")))

NANOSECONDS = 1_000_000_000
HERE = Environment("abc123", "2026-01-02T03:04:05+00:00", "a processor, with a comma", "", "2.13.0", "", "3.11.7", 2)
MINUTE = Workload(tensors(5, 33))


class FakeClock:
    """Time that passes only where the contenders say so."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class FakeRunner:
    def __init__(self, label: str, clock: FakeClock, seconds: list[float]) -> None:
        self.label, self.clock, self.seconds = label, clock, seconds
        self.prepared: list[int] = []

    def prepare(self, step: int) -> None:
        self.clock.now += 17 * NANOSECONDS
        self.prepared.append(step)

    def run(self) -> None:
        step = self.prepared[-1]
        self.clock.now += round(self.seconds[step % len(self.seconds)] * NANOSECONDS)


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    """The examples of a page make one, in the same process perhaps."""
    yield
    leave_group()


def adam_case(**changes: object) -> Case:
    case = Case(
        "adam 5x33",
        "adam",
        "5x33",
        MINUTE,
        "fused",
        goals=(Goal("speedup", "≥", 2),),
        seconds=0.05,
        least_rounds=5,
    )
    return dataclasses.replace(case, **changes)  # type: ignore[arg-type]


def test_times_are_per_step_without_preparation_and_without_warm_up() -> None:
    clock = FakeClock()
    slow, fast = FakeRunner("slow", clock, [99, 99, 8, 8, 6, 6]), FakeRunner("fast", clock, [99, 99, 2, 2, 3, 3])
    samples = race([slow, fast], seconds=0, least_rounds=2, warm_up=1, steps_per_round=2, clock=clock)
    assert samples.seconds == {"slow": [8, 6], "fast": [2, 3]}
    assert samples.steps == 6
    assert slow.prepared == fast.prepared == list(range(6))


def test_ratios_are_taken_round_by_round() -> None:
    samples = Samples()
    for slow, fast in ((8.0, 2.0), (6.0, 3.0), (9.0, 3.0)):
        samples.add("slow", slow)
        samples.add("fast", fast)
    assert samples.ratio("slow", "fast") == Spread(pytest.approx(2.4), 3.0, pytest.approx(3.6))
    assert samples.time("slow").p50 == 8.0


def test_a_rate_is_the_reciprocal_of_a_time() -> None:
    assert Spread(1.0, 2.0, 4.0).reciprocal(8.0) == Spread(2.0, 4.0, 8.0)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_contender_takes_every_place_equally_often(count: int) -> None:
    clock = FakeClock()
    runners = [FakeRunner(str(i), clock, [1]) for i in range(count)]
    places = [[order(runners, round_).index(runner) for round_ in range(2 * count)] for runner in runners]
    assert all(sorted(taken) == sorted(list(range(count)) * 2) for taken in places)


def test_gradients_are_new_tensors_with_the_same_values_for_all() -> None:
    shared = Tensors(MINUTE)
    ours, theirs = shared.parameters(), shared.parameters()
    seen = []
    for step in range(4):
        for parameters in (ours, theirs):
            shared.give_gradients(parameters, step)
            seen.append([p.grad for p in parameters])
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
    assert len({id(g) for gradients in seen for g in gradients}) == 8 * 5
    assert not torch.equal(seen[0][0], seen[2][0])


def test_rewritten_gradients_change_their_address() -> None:
    shared = Tensors(Workload(tensors(1, 100), gradients="rewritten"))
    (p,) = shared.parameters()
    addresses = []
    for step in range(3):
        shared.give_gradients([p], step)
        addresses.append(p.grad.data_ptr())
    assert addresses[0] == addresses[2] != addresses[1]


def test_absent_gradients_differ_from_step_to_step_and_are_half() -> None:
    shared = Tensors(Workload(tensors(10, 3), absent=0.5))
    parameters = shared.parameters()
    patterns = []
    for step in range(5):
        shared.give_gradients(parameters, step)
        patterns.append(tuple(p.grad is None for p in parameters))
    assert [sum(pattern) for pattern in patterns] == [0, 5, 5, 5, 5]
    assert len(set(patterns)) > 2


def raced_adam(**hyper: object) -> tuple[list[torch.Tensor], Tensors, int]:
    shared = Tensors(Workload(tensors(20, 50)))
    runner = OptimizerRunner(Contender("adam", lambda groups: torch.optim.Adam(groups, foreach=False, **hyper)), shared)
    steps = race([runner], seconds=0, least_rounds=8, warm_up=2).steps
    return list(runner.parameters), shared, steps


def test_foreach_does_the_same_work() -> None:
    reference, shared, steps = raced_adam()
    runner = OptimizerRunner(rivals("torch", "Adam", {})[1], shared)
    assert race([runner], seconds=0, least_rounds=8, warm_up=2).steps == steps
    assert agreement(runner.parameters, reference, shared.initial, steps).same_work


@pytest.mark.parametrize(
    "wrong",
    [{"betas": (0.9, 0.998)}, {"lr": 1.001e-3}, {"weight_decay": 1e-3}, {"amsgrad": True}, {"eps": 1e-4}],
    ids=str,
)
def test_a_contender_that_does_other_work_is_found_out(wrong: dict[str, object]) -> None:
    reference, shared, steps = raced_adam()
    other, _, _ = raced_adam(**wrong)
    assert not agreement(other, reference, shared.initial, steps).same_work


def test_in_bfloat16_other_roundings_are_the_same_work_and_other_rules_are_not() -> None:
    shared = Tensors(Workload(tensors(3, 400), dtype=torch.bfloat16))

    def adam(**hyper: object) -> Contender:
        return Contender("", lambda groups: torch.optim.Adam(groups, foreach=False, **{"lr": 0.1, **hyper}))

    own = OptimizerRunner(Contender("", lambda groups: fastopt.Adam(groups, lr=0.1)), shared)
    steps = race([own], seconds=0, least_rounds=12, warm_up=1).steps
    for contender, same in ((adam(), True), (adam(lr=0.11), False), (adam(lr=0.0), False)):
        other = OptimizerRunner(contender, shared)
        race([other], seconds=0, least_rounds=12, warm_up=1)
        result = agreement(own.parameters, other.parameters, shared.initial, steps)
        assert result.same_work == same, result


def test_a_rival_that_did_other_work_is_named_and_not_the_one_to_beat() -> None:
    rows = sample_rows(same_work=0.0)
    slower = [
        Row.of(HERE, "adam 1000x64", "torch foreach", "us_per_step", 4000.0),
        Row.of(HERE, "adam 1000x64", "fastopt", "speedup/torch foreach", 8.0),
        Row.of(HERE, "adam 1000x64", "fastopt", "same_work/torch foreach", 1.0),
    ]
    (case,) = (case for case in CASES if case.name == "adam 1000x64")
    alone, both = (cpu_tables.Verdict.of(case, Results(given)) for given in (rows, [*rows, *slower]))
    assert (alone.rival, alone.agreement) == ("torch fused", "**different work**")
    assert (both.rival, both.agreement) == ("torch foreach", "yes; not torch fused: **different work**")


def test_parameters_that_did_not_move_prove_nothing() -> None:
    still = [torch.ones(3)]
    assert not agreement(still, still, still, 5).same_work


def test_what_is_not_finite_does_not_agree() -> None:
    broken = [torch.tensor([1.0, math.nan])]
    result = agreement(broken, [torch.tensor([1.0, 2.0])], [torch.zeros(2)], 5)
    assert result == Agreement(math.inf, math.inf, result.moved, 5)
    assert not result.same_work


def test_the_stand_in_ranger_is_radam_with_lookahead() -> None:
    """Against torch's RAdam and the paper's pull-back, one step at a time."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    ranger = ForeachRanger([ours], lr=0.1, betas=(0.9, 0.999), eps=1e-8, k=3, alpha=0.5)
    radam, slow = torch.optim.RAdam([theirs], lr=0.1, betas=(0.9, 0.999), eps=1e-8), theirs.detach().clone()
    for step in range(1, 13):
        ours.grad, theirs.grad = (torch.sin(torch.arange(9.0) * step) for _ in range(2))
        ranger.step()
        radam.step()
        if step % 3 == 0:
            slow.lerp_(theirs.detach(), 0.5)
            theirs.data.copy_(slow)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert rectify(5, 0.999) is None
    assert rectify(6, 0.999) == pytest.approx(0.025821 * math.sqrt(1 - 0.999**6), rel=1e-4)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.csv"
    first = Row.of(HERE, "adam 1x1", "fastopt", "us_per_step", Spread(1.5, 2.25, 1234567.0))
    second = Row.of(HERE, "adam 1x1", "fastopt", "rounds", 12.0)
    append(path, [first])
    append(path, [second])
    assert read(path) == [dataclasses.replace(first, p80=1.23457e6), second]
    assert path.read_text(encoding="utf-8").count(COLUMNS[0]) == 1


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="starts with 'a,b'; a benchmark CSV starts with 'commit,date"):
        read(path)


def sample_rows(speedup: float = 3.0, same_work: float = 1.0, environment: Environment = HERE) -> list[Row]:
    def row(contender: str, metric: str, value: float) -> Row:
        return Row.of(environment, "adam 1000x64", contender, metric, Spread(value * 0.9, value, value * 1.1))

    return [
        row("fastopt", "us_per_step", 500.0),
        row("torch fused", "us_per_step", 500.0 * speedup),
        row("fastopt", "speedup/torch fused", speedup),
        Row.of(environment, "adam 1000x64", "fastopt", "same_work/torch fused", same_work),
    ]


def test_the_report_is_idempotent_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    csv, readme = tmp_path / "cpu.csv", tmp_path / "README.md"
    append(csv, sample_rows())
    opening, closing = OPENING.format(name="cpu"), CLOSING.format(name="cpu")
    readme.write_text(f"# Title\n\n{opening}\nold\n{closing}\n\nafter\n", encoding="utf-8")
    assert write(csv, tmp_path / "gpu.csv", pages(tmp_path), tmp_path) == [readme, tmp_path / "cpu.png"]
    once, picture = readme.read_text(encoding="utf-8"), (tmp_path / "cpu.png").read_bytes()
    write(csv, tmp_path / "gpu.csv", pages(tmp_path), tmp_path)
    assert readme.read_text(encoding="utf-8") == once
    assert (tmp_path / "cpu.png").read_bytes() == picture
    assert once.startswith("# Title\n\n<!-- bench:cpu -->\n")
    assert once.endswith("<!-- /bench:cpu -->\n\nafter\n")
    assert "| 1000x64 | 500 µs | 1.5 ms | 3.00 (2.70–3.30) | ≥ 30x | yes |" in once
    assert "old" not in once


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<!-- bench:cpu -->\n", "page has a marker without its other: 1 begin a block and 0 end one"),
        ("<!-- /bench:cpu -->\n<!-- bench:cpu -->\n", "page has a marker without its other"),
        ("<!-- bench:cpu -->\n<!-- /bench:gpu -->\n", "must have the same name, one of gpu, gpu short, "),
        ("<!-- bench:cpus -->\n<!-- /bench:cpus -->\n", "must have the same name, one of gpu, gpu short, "),
    ],
)
def test_markers_that_cannot_be_filled_are_named(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        with_blocks(text, lambda name: "body", "page")


def test_every_block_of_the_pages_can_be_written_and_every_table_has_a_page() -> None:
    asked: list[str] = []
    for page in pages(ROOT):
        with_blocks(page.read_text(encoding="utf-8"), lambda name: asked.append(name) or "", str(page))
    assert {*asked} == {*GPU_BLOCKS, ELSEWHERE, *cpu_tables.names()}
    assert all(cpu_tables.block(name, []) == cpu_tables.UNMEASURED for name in cpu_tables.names())


def test_figures_of_the_pages_are_those_of_the_records() -> None:
    """Nobody has edited a table, and no newer record waits for `python -m bench report`."""
    body = bodies(*(ROOT / "bench" / "results" / name for name in ("cpu.csv", "gpu.csv")))
    for page in pages(ROOT):
        text = page.read_text(encoding="utf-8")
        assert with_blocks(text, body) == text, page


def test_blocks_of_a_gpu_say_so_where_nothing_was_measured(tmp_path: Path) -> None:
    body = bodies(ROOT / "bench" / "results" / "cpu.csv", tmp_path / "gpu.csv")
    assert [body(name) for name in GPU_BLOCKS] == [UNMEASURED] * len(GPU_BLOCKS)


def test_a_block_names_the_runs_that_its_figures_come_from_and_no_other() -> None:
    later = dataclasses.replace(HERE, date="2099-01-01T00:00:00+00:00", device="another machine")
    mixed = dataclasses.replace(sample_rows(environment=later)[0], case="mix adam 20x1,000,000 bf16")
    rows = [*sample_rows(), mixed]
    assert [later.device in cpu_tables.block(name, rows) for name in ("cpu", "mixes", "cost Adam")] == [
        False,
        True,
        True,
    ]
    assert HERE.date in cpu_tables.block("cpu", rows)
    assert HERE.date not in cpu_tables.block("mixes", rows)


def test_different_work_is_marked() -> None:
    assert "**different work**" in markdown(sample_rows(same_work=0.0))


def test_the_latest_run_of_a_case_is_shown_and_named() -> None:
    later = dataclasses.replace(HERE, commit="def456", date="2026-02-02T03:04:05+00:00")
    text = markdown([*sample_rows(3.0), *sample_rows(4.0, environment=later)])
    assert "4.00 (3.60–4.40)" in text
    assert "3.00" not in text
    assert "def456" in text
    assert "abc123" not in text


def test_cases_are_well_formed() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert len(case.workload.shapes) % case.workload.groups == 0
        assert case.workload.dtype == MIXES[case.mix][0]
        assert matches(case.name, case.name)
        assert not case.table.startswith("curve ") or case.x > 0


def test_every_rule_and_every_way_to_store_it_is_measured() -> None:
    assert {kind.name for kind in RULES.values()} == {*public_rules(), "Lookahead"}
    assert {(case.kind.label, case.mix) for case in CASES if case.table == "mixes"} == {
        (label, mix) for label in RULES for mix in MIXES
    }
    assert {case.kind.label for case in CASES if case.table == "everyone" and case.studied} == {*RULES}
    assert {case.table for case in CASES if case.x} == {f"curve {of}" for of in CURVES}


@pytest.mark.parametrize(
    ("model", "count", "parameters"),
    [
        ("ResNet-50", 161, 25_557_032),
        ("ViT-L", 296, 304_326_632),
        ("GPT-2", 148, 124_439_808),
        ("Llama-7B", 291, 6_738_415_616),
    ],
)
def test_models_have_the_parameters_that_their_authors_count(model: str, count: int, parameters: int) -> None:
    shapes = MODELS[model]()
    assert len(shapes) == count
    assert sum(map(math.prod, shapes)) == parameters
    assert len(scaled(shapes, 8)) == count
    assert all(n > 0 for shape in scaled(shapes, 8) for n in shape)


def test_misaligned_tensors_are_so_and_have_the_same_values() -> None:
    aligned, misaligned = (Tensors(Workload(tensors(3, 50), misaligned=m)) for m in (False, True))
    for p, q in zip(aligned.parameters(), misaligned.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() % 16 == 0 < q.data_ptr() % 16
    parameters = misaligned.parameters()
    misaligned.give_gradients(parameters, 0)
    assert all(p.grad.data_ptr() % 16 for p in parameters)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_sharded_tensors_have_the_same_values_and_take_the_same_steps() -> None:
    case = adam_case(workload=Workload(tensors(3, 50), sharded=True), kind=RULES["AdamW"], rivals="fast")
    measured = {(who, metric): value for who, metric, value in measure_case(case)}
    for rival in ("torch fused", "torch foreach"):
        assert measured["fastopt", f"same_work/{rival}"] == 1.0
    plain = Tensors(Workload(tensors(3, 50)))
    parameters, others = Tensors(case.workload).parameters(), plain.parameters()
    assert {type(p._local_tensor) for p in parameters} == {torch.Tensor}
    assert all(torch.equal(p._local_tensor, q) for p, q in zip(parameters, others, strict=True))


def test_groups_deal_all_tensors_and_all_settings() -> None:
    workload = Workload(tensors(12, 2), groups=6, settings=3)
    groups = workload.deal(Tensors(workload).parameters())
    assert [len(group["params"]) for group in groups] == [2] * 6
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == 3


def test_quick_leaves_out_the_large_tensors() -> None:
    names = {job.name for job in jobs(quick=True)}
    assert names < {job.name for job in jobs()}
    assert not any("50,000,000" in name for name in names)
    assert [job.name for job in jobs("adam 1000x64")] == ["adam 1000x64"]


@native
def test_smallest_case_runs_and_agrees() -> None:
    one_tensor = Yardstick("fastopt, one tensor", workload=Workload(tensors(1, 33)))
    measured = {
        (contender, metric): value for contender, metric, value in measure_case(adam_case(yardstick=one_tensor))
    }
    assert measured["fastopt", "same_work/torch fused"] == 1.0
    assert {"speedup/torch fused", "cost/fastopt, one tensor", "us_per_step", "rounds"} <= {
        metric for _, metric in measured
    }


def test_noise_case_needs_no_subject_of_ours() -> None:
    measured = {
        (contender, metric): value for contender, metric, value in measure_case(adam_case(rivals="same", table="noise"))
    }
    assert measured["torch fused again", "max_ulp/torch fused"] == 0.0


def test_allocations_are_counted() -> None:
    foreach = rivals("torch", "Adam", {})[1]
    result = allocations.measure(foreach, MINUTE, 10)
    assert min(result.torch_per_step) >= len(MINUTE.shapes)


def test_command_prints_tables_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, csv = torch.get_num_threads(), tmp_path / "cpu.csv"
    try:
        assert main(["cpu", "--quick", "--only", "noise 1000x64", "--csv", str(csv), "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr()
    assert "**Noise of the run" in output.out
    assert "[1/1" in output.err
    assert {row.case for row in read(csv)} == {"noise 1000x64"}


def test_command_names_the_cases_when_none_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "--only", "no such case"]) == 2
    assert "the cases are: stream 1x50,000,000, adam 1000x64" in capsys.readouterr().err


def test_another_clock_may_take_the_turns() -> None:
    taken: list[tuple[str, int, int]] = []

    def turn(runner: FakeRunner, first_step: int, steps: int) -> float:
        taken.append((runner.label, first_step, steps))
        return 2.5

    samples = race(
        [FakeRunner("one", FakeClock(), [])], seconds=0, least_rounds=2, warm_up=1, steps_per_round=5, turn=turn
    )
    assert taken == [("one", 0, 5), ("one", 5, 5), ("one", 10, 5)]
    assert samples.seconds == {"one": [2.5, 2.5]}


def test_shared_gradients_are_the_same_memory_for_all_and_change_with_the_step() -> None:
    shared = Tensors(Workload(tensors(3, 50), gradients="shared"))
    ours, theirs = shared.parameters(), shared.parameters()
    addresses = []
    for step in range(2):
        for parameters in (ours, theirs):
            shared.give_gradients(parameters, step)
        assert [p.grad.data_ptr() for p in ours] == [p.grad.data_ptr() for p in theirs]
        assert all(a.grad is not b.grad for a, b in zip(ours, theirs, strict=True))
        addresses.append([p.grad.data_ptr() for p in ours])
    assert not set(addresses[0]) & set(addresses[1])


def test_agreement_does_not_depend_on_how_tensors_are_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    start, ours = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    theirs = ours + 1e-6
    whole = agreement([ours], [theirs], [start], 9)
    pieces = agreement(ours.split(7), theirs.split(7), start.split(7), 9)
    assert whole.largest == pieces.largest
    assert whole.rms == pytest.approx(pieces.rms, rel=1e-6)


def test_gpu_cases_are_well_formed() -> None:
    assert len({case.name for case in GPU_CASES}) == len(GPU_CASES)
    for case in GPU_CASES:
        assert len(case.workload.shapes) % case.workload.groups == 0
        assert case.mix in MIXES
        assert case.workload.dtype == MIXES[case.mix][0]
        assert not case.stripped or case.clock == "device"
    assert {case.kind.label for case in GPU_CASES} == set(RULES)


@pytest.mark.parametrize(
    ("rule", "mix", "nbytes"),
    [("Adam", "fp32", 28), ("Adam", "bf16, fp32 states", 22), ("AMSGrad", "bf16", 18), ("SGD", "fp32", 12)],
)
def test_bytes_that_a_step_must_move(rule: str, mix: str, nbytes: int) -> None:
    """The table of bytes per parameter that one pass reads and writes."""
    assert RULES[rule].bytes_per_element(mix) == nbytes


def gpu_rows(work: float = 1.0) -> list[Row]:
    case = next(case for case in GPU_CASES if case.name.startswith("fused adam 200x"))

    def row(contender: str, metric: str, value: float) -> Row:
        return Row.of(HERE, case.name, contender, metric, value)

    return [
        row("fastopt", "us_per_step", 1300.0),
        row("fastopt triton", "us_per_step", 1310.0),
        row("torch fused", "us_per_step", 1560.0),
        row("torch foreach", "us_per_step", 3900.0),
        row("fastopt", "speedup/torch foreach", 3.0),
        row("fastopt", "speedup/torch fused", 1.2),
        row("fastopt", "speedup/fastopt triton", 1.01),
        row("fastopt", "same_work/torch fused", work),
        row("fastopt", "max_ulp/fastopt triton", 0.0),
        row("fastopt", "gb_per_s", 4300.0),
        row("fastopt", f"rate/{STRIPPED}", 0.97),
        row("fastopt", "share/torch copy_", 1.01),
    ]


def test_gpu_tables_show_the_goals_beside_the_figures() -> None:
    text = gpu_markdown(gpu_rows())
    assert (
        "| Adam | fp32 | 200x1,000,000 | 1.3 ms | 1.31 ms | 1.56 ms (torch fused) | 1.20 (1.20–1.20) | ≥ 1.1x |" in text
    )
    assert "0.97 (0.97–0.97)" in text
    assert "≥ 0.95x, ≥ 0.9x" in text
    assert "**different work**" in gpu_markdown(gpu_rows(work=0.0))


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    csv, gpu_csv, readme = tmp_path / "cpu.csv", tmp_path / "gpu.csv", tmp_path / "README.md"
    append(csv, sample_rows())
    readme.write_text(f"a\n{OPENING.format(name='gpu')}\nold\n{CLOSING.format(name='gpu')}\nb\n", encoding="utf-8")
    write(csv, gpu_csv, [readme], tmp_path)
    assert f"\n{UNMEASURED}\n" in readme.read_text(encoding="utf-8")
    append(gpu_csv, gpu_rows())
    write(csv, gpu_csv, [readme], tmp_path)
    text = readme.read_text(encoding="utf-8")
    assert UNMEASURED not in text
    assert "1.3 ms" in text
    readme.write_text("no markers\n", encoding="utf-8")
    assert readme not in write(csv, gpu_csv, [readme], tmp_path)
    assert readme.read_text(encoding="utf-8") == "no markers\n"


class Refuses(torch.optim.SGD):
    def step(self, closure: object = None) -> None:
        raise RuntimeError("needs another machine")


@native
def test_a_rival_that_cannot_do_a_step_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_one_that_refuses(*_: object) -> list[Contender]:
        return [Contender("refuses", lambda groups: Refuses(groups)), *rivals("fused", "Adam", {})]

    monkeypatch.setattr("bench.cpu.rivals", with_one_that_refuses)
    measured = measure_case(adam_case())
    assert "without refuses: needs another machine" in capsys.readouterr().err
    assert {contender for contender, _, _ in measured} == {OURS, "torch fused"}


def test_a_case_of_ours_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cpu.ours", lambda *_: Contender(OURS, lambda groups: Refuses(groups)))
    monkeypatch.setattr("bench.cpu.rivals", lambda *_: [])
    field = Field.of(adam_case(studied=True))
    with pytest.raises(RuntimeError, match="needs another machine"):
        field.seat(backwards=False)["fastopt"].run()


def test_peers_are_given_our_hyper_parameters_and_none_that_they_lack() -> None:
    assert peers.defaults("Adam")["betas"] == (0.9, 0.999)
    adam = next(peer for peer in peers.PEERS if peer.rule == "Adam" and not peer.device)
    lacking = dataclasses.replace(adam, module="math")
    assert lacking.can({"eps": 1e-8})
    assert not lacking.can({"amsgrad": True})
    assert not dataclasses.replace(adam, module="no_such_package").can({})
    given: dict[str, object] = {}
    math_module = peers.load("math")
    made = dataclasses.replace(adam, module="math", name="isclose", takes="lr eps", fixed={"foreach": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math_module, "isclose", lambda groups, **settings: given.update(settings))
        made.factory({"lr": 0.5, "eps": 0.25, "betas": (0, 0)})([])
    assert given == {"lr": 0.5, "eps": 0.25, "foreach": True}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the packages' own
@pytest.mark.parametrize("label", RULES)
def test_installed_peers_take_a_step_or_say_why_they_differ(label: str) -> None:
    """Each does our work on small tensors, or its entry says what is different."""
    kind = RULES[label]
    shared = Tensors(Workload(tensors(3, 40)))
    own = OptimizerRunner(ours(kind.name, kind.hyper, backend="reference"), shared)
    found = rivals("peers", kind.name, kind.hyper)
    runners = [OptimizerRunner(c, shared) for c in found if c.label != "torchao"]  # it compiles for a minute
    if not runners:
        pytest.skip(f"no package of bench/peers.txt that has {label} is installed")
    steps = race([own, *runners], seconds=0, least_rounds=7, warm_up=1).steps
    for runner in runners:
        same = agreement(own.parameters, runner.parameters, shared.initial, steps).same_work
        assert same != bool(peers.why_different(runner.label, kind.name)), runner.label


@native
@pytest.mark.parametrize("label", ["Adam", "Ranger", "Lookahead, Adam"])
def test_a_study_counts_what_a_step_takes(label: str) -> None:
    kind = RULES[label]
    case = Case("study", "everyone", "3x40", Workload(tensors(3, 40)), "none", kind)
    contenders = [ours(kind.name, kind.hyper), *rivals("torch", kind.name, kind.hyper)]
    measured = {(who, metric): value for who, metric, value in study.study(case, contenders)}
    assert measured[OURS, "peak_extra_bytes"] == 0
    assert measured[OURS, "first_step_us"] > 0
    assert 0 < measured[OURS, "rms_error"] <= measured[OURS, "max_error"] < 30
    for contender in contenders[1:]:
        assert measured[contender.label, "operators"] > measured[OURS, "operators"]
        assert measured[contender.label, "peak_extra_bytes"] > 0
        assert measured[OURS, "rms_error"] <= 1.01 * measured[contender.label, "rms_error"]


def test_streams_without_arithmetic_touch_every_element() -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    runner = streams.stripped(states=2, numel=1003)
    g, *updated = runner.tensors
    g.fill_(5.0)
    runner.run()
    assert all(torch.equal(tensor, torch.full_like(tensor, 4.0)) for tensor in updated)
    assert len(updated) == 3


@native
def test_trainings_train_and_agree() -> None:
    quick = dataclasses.replace(training.TRAININGS[0], steps=6)
    measured = {(who, metric): value for who, metric, value in training.measure(quick)}
    assert {metric for _, metric in measured} >= {"training_us", "part_of_training", "final_loss"}
    losses = [value for (_, metric), value in measured.items() if metric == "final_loss"]
    assert max(losses) - min(losses) < 1e-4 * max(losses)
    assert all(0 < v.p50 < 1 for (_, metric), v in measured.items() if metric == "part_of_training")
    assert training.convnet("cpu").make_model(0)(torch.zeros(2, 64)).shape == (2, 10)


def outcome(change: tuple[float, float, float], noise: tuple[float, float, float]) -> commits.Outcome:
    return commits.Outcome(commits.CASES[0], Spread(1, 1, 1), Spread(*change), Spread(*noise))


@pytest.mark.parametrize(
    ("change", "noise", "verdict"),
    [
        ((1.2, 1.3, 1.4), (0.95, 1.0, 1.05), "**slower**"),
        ((1.0, 1.3, 1.4), (0.95, 1.0, 1.05), "within the noise"),
        ((1.2, 1.3, 1.4), (0.7, 1.0, 1.05), "within the noise"),
        ((1.2, 1.3, 1.4), (0.95, 1.0, 1.25), "within the noise"),
        ((0.7, 0.8, 0.9), (0.95, 1.0, 1.05), "faster"),
        ((0.7, 0.8, 0.9), (0.95, 1.0, 1.2), "within the noise"),
    ],
)
def test_only_what_is_beyond_the_noise_is_flagged(
    change: tuple[float, float, float], noise: tuple[float, float, float], verdict: str
) -> None:
    assert outcome(change, noise).verdict == verdict
    assert verdict in commits.markdown([outcome(change, noise)], "HEAD")


@native
def test_a_tree_is_raced_against_another_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tree is this one, so that nothing has to be built; times are not looked at."""
    monkeypatch.setattr(commits, "_checkout", lambda revision, folder: ROOT)
    monkeypatch.setattr(commits, "QUICK", ("adam 400 groups",))
    (found,) = commits.compare("HEAD", quick=True, threads=1, seconds=0.1)
    assert found.seconds.p50 > 0
    assert found.change.p20 <= found.change.p50 <= found.change.p80


def test_another_package_than_the_asked_one_is_noticed(tmp_path: Path) -> None:
    worker = commits.Worker("elsewhere", tmp_path, 1)
    with pytest.raises(RuntimeError, match="the process of elsewhere ended with 1"):
        worker.ask(case="adam 1000x64")


def test_a_revision_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    assert main(["compare", "no-such-commit"]) == 2
    assert "'no-such-commit' is no commit of this repository" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@native
def test_a_rehearsal_takes_every_path_and_records_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for only in ("small adam 1x1,000", "fused sgd 200x1,000,000 fp32"):
        assert main(["gpu", "--dry", "--only", only, "--out", str(tmp_path)]) == 0
    assert "none of them a measurement" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_job_begins_only_if_its_time_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--dry", "--seconds", "0.5", "--only", "launches*"]) == 0
    assert "left out, no time" in capsys.readouterr().err
    assert [job.name for job in gpu_jobs() if job.last] == ["launches 1,000x1,000"]


def test_a_part_that_overruns_is_stopped_and_keeps_its_log(tmp_path: Path) -> None:
    script = "import time; print('begun', flush=True); time.sleep(60)"
    process = Process(tmp_path / "log", [sys.executable, "-c", script]).start()
    begun = time.monotonic()
    while "begun" not in (tmp_path / "log").read_text() and time.monotonic() < begun + 30:
        time.sleep(0.05)
    assert process.wait(time.monotonic()) == 124
    assert time.monotonic() < begun + 45
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()
    assert Process(tmp_path / "log", [sys.executable, "-c", "raise SystemExit(7)"]).start().wait(begun + 60) == 7


def test_a_part_that_fails_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, dict.fromkeys(("build", "tests", "bench", "sweep"), 1.0), 1, dry=True)
    run.bench = lambda until: 1 / 0  # type: ignore[method-assign]
    outcome = run.part("bench")
    assert not outcome.ok
    assert "ZeroDivisionError" in str(outcome)
    assert "FAILED" in capsys.readouterr().out


def test_the_sweeps_summary_sorts_by_time() -> None:
    def row(shape: str, ms: str, host: str = "") -> dict[str, str]:
        known = {"shape": shape, "chain": "adam", "mix": "fp32", "hints": "yes", "ms_p50": ms, "gb_per_s": "4000"}
        return {**known, "registers": "40", "blocks_per_sm": "6", "host_us": host}

    text = summary([row("slow", "2.0"), row("fast", "1.5"), row("4 KB of parameters", "", "2.5")])
    assert text.index("fast") < text.index("slow")
    assert "2.5 us" in text


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
def test_the_sweep_compiles_without_spills(tmp_path: Path) -> None:
    """A shape that spills would be compared for its spills."""
    flags = ["-std=c++20", "-O3", "-arch=sm_90", "-fmad=false", f"-I{ROOT / 'csrc'}", "-cubin", "-Xptxas", "-v"]
    command = [str(nvcc()), *flags, str(SOURCE), "-o", str(tmp_path / "sweep.cubin")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    spills = [line for line in run.stderr.splitlines() if "spill stores" in line]
    assert len(spills) > 50
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
