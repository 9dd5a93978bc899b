"""The demo: fair twins, a row for each race, and files that hold what the table says."""

import csv
import sys

import pytest
import torch

import fastopt
from fastopt import report
from fastopt.__main__ import main
from fastopt.tools import demo, tasks


@pytest.fixture(scope="module")
def small() -> demo.Demo:
    return demo.run(task_names=["digits"], steps=12, progress=False)


def test_a_row_for_every_task_and_optimizer(small):
    rows = small.table().splitlines()[3:]
    assert [row.split()[:2] for row in rows] == [["digits", name] for name in demo.LEARNING_RATES]


def test_every_implementation_of_torch_takes_part(small):
    lanes = {result.optimizer: [lane.label for lane in result.torch_lanes] for result in small.results}
    assert lanes["Adam"] == lanes["AdamW"] == ["default", "foreach", "fused"]
    assert lanes["RAdam"] == lanes["NAdam"] == lanes["Ranger"] == ["default", "foreach"]
    assert all(result.torch_best in result.torch_lanes for result in small.results)


def test_twins_see_the_same_data_and_compute_the_same_rule(small):
    for result in small.results:
        for lane in (*result.torch_lanes, result.fastopt):
            assert lane.losses[0] == result.torch_default.losses[0], "same weights, same batch"
            assert len(lane.losses) == len(lane.step_seconds) == 12
            assert 0 < sum(lane.step_seconds) < lane.train_seconds
        if result.same_rule:
            # Only the last bit of torch's square roots is between them, and 12 steps do not amplify it beyond 1e-5.
            assert result.fastopt.difference(result.torch_default) < 1e-5
            assert result.fastopt.score == pytest.approx(result.torch_default.score, abs=1e-5)


def test_a_race_of_torch_against_itself_is_identical():
    itself = demo.Pair("Adam", torch.optim.Adam, {"default": torch.optim.Adam})
    result = demo.race(tasks.get("digits"), itself, 5, 0, report.Progress(5, show=False))
    assert result.fastopt.difference(result.torch_default) == 0
    assert result.fastopt.score == result.torch_default.score
    assert "identical" in demo.Demo((result,), 0, 1).table()


def test_the_best_of_torch_and_the_speed_up_come_from_the_medians():
    def lane(label: str, milliseconds: float) -> demo.Lane:
        parameter = torch.zeros(1, requires_grad=True)
        timed = demo.Lane(label, torch.nn.Identity(), torch.optim.SGD([parameter]), losses=[1.0, 0.5])
        timed.step_seconds = [milliseconds / 1e3, milliseconds / 1e3]
        timed.score = 0.5
        return timed

    lanes = lane("default", 6.0), lane("foreach", 3.0)
    result = demo.Result("digits", "Adam", "test_loss", lanes, lane("fastopt", 0.5), same_rule=True)
    row = demo.Demo((result,), 0, 1).table().splitlines()[-1]
    assert "3.000 foreach" in row
    assert "12.0x, 6.0x" in row


def test_ranger_is_said_to_have_no_twin(small):
    assert "another rule" in small.table()
    assert "Ranger: torch has none" in small.notes()
    assert "Ranger" not in demo.Demo(small.results[:1], 0, 1).notes()


def test_it_says_when_the_kernels_are_missing(small, monkeypatch):
    monkeypatch.setattr(fastopt.backends, "why_not", lambda name, device="cpu": "no compiler was found")
    assert "expect no speed-up: no compiler was found" in small.notes()
    monkeypatch.setattr(fastopt.backends, "why_not", lambda name, device="cpu": "")
    assert "expect no speed-up" not in small.notes()


def test_files(small, tmp_path):
    printed = demo.save(small, tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "new" / "picture.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(result.torch_lanes) + 1 for result in small.results)
    ours = next(row for row in rows if (row["optimizer"], row["implementation"]) == ("RAdam", "fastopt"))
    radam = next(result for result in small.results if result.optimizer == "RAdam")
    assert float(ours["score"]) == radam.fastopt.score
    assert float(ours["step_p20"]) <= float(ours["step_p50"]) <= float(ours["step_p80"])
    assert "picture.png" in printed


def test_without_matplotlib_the_numbers_still_come(small, tmp_path, monkeypatch):
    def missing(module: str, purpose: str) -> None:
        raise ModuleNotFoundError(f"{purpose} needs {module}")

    monkeypatch.setattr("fastopt.tools.plots.need", missing)
    printed = demo.save(small, tmp_path / "demo.png")
    assert "No picture: drawing the picture needs matplotlib" in printed
    assert (tmp_path / "demo.csv").exists()


def test_threads_are_put_back():
    before = torch.get_num_threads()
    demo.run(task_names=["digits"], optimizers=["Adam"], steps=1, threads=before + 1, progress=False)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"optimizers": ["SGD"]}, "no optimizer 'SGD': it races Adam, AdamW, RAdam, NAdam, Ranger"),
        ({"task_names": ["mnist"]}, "unknown task 'mnist'"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        demo.run(**options, progress=False)


def test_the_command(tmp_path, capsys):
    assert main(["demo", "--steps", "2", "--out", str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr().out
    assert "digits  Ranger" in printed
    assert "chars   Adam" in printed
    assert (tmp_path / "demo.png").exists()


def test_the_table_is_printed_before_files_are_written(small, tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(demo, "run", lambda *_, **__: small)
    monkeypatch.setattr(demo.Demo, "to_csv", full)
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 2
    printed = capsys.readouterr()
    assert small.table() in printed.out
    assert "No space left" in printed.err


def without(monkeypatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_without_its_data_digits_is_left_out_and_everything_missing_is_named(tmp_path, capsys, monkeypatch):
    without(monkeypatch, "sklearn", "sklearn.datasets", "matplotlib")
    assert main(["demo", "--steps", "1", "--out", str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr()
    assert "chars  Adam" in printed.out
    assert "going on without digits, picture: digits needs scikit-learn, picture needs matplotlib; pip install" in (
        printed.err
    )


def test_without_its_data_digits_alone_says_what_can_be_done(tmp_path, capsys, monkeypatch):
    without(monkeypatch, "sklearn", "sklearn.datasets")
    assert main(["demo", "--task", "digits", "--out", str(tmp_path / "demo.png")]) == 2
    assert "digits needs scikit-learn; pip install scikit-learn" in (said := capsys.readouterr().err)
    assert "--task chars" in said


@pytest.mark.parametrize("name", ["demo.foo", "demo", "."])
def test_where_no_picture_can_be_written_is_said_before_the_training(name, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / name)]) == 2
    assert "accepted are files whose names end in .png" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["taken.png", "/proc/x.png"])
def test_files_that_cannot_be_written_are_known_before_the_training(target, tmp_path, capsys, monkeypatch):
    (tmp_path / "taken.csv").mkdir()
    monkeypatch.setattr(demo, "run", lambda *_, **__: pytest.fail("trained"))
    assert main(["demo", "--out", str(tmp_path / target)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken.csv"], "looking left nothing behind"
