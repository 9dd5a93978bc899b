"""setup.py: what a build includes, what builds share, and what it says when it cannot do what was asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cuda_listing
import pytest

SETTINGS = ("FASTOPT_CUDA", "FASTOPT_CUDA_ARCHS", "FASTOPT_CUDA_MIXES", "FASTOPT_EMULATOR", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py on a machine with an nvcc and without a GPU, nothing being asked for."""
    module = cuda_listing.build_script()
    if module is None:
        pytest.skip("an installed package without setup.py")
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(module, "gpus", list)
    monkeypatch.setattr(module, "known_archs", lambda nvcc: ["80", "90", "100"])
    monkeypatch.setattr(module, "cuda", module.cuda.__wrapped__)  # without its cache
    return module


def test_without_a_gpu_only_the_cpu_is_built_for(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.cuda() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "CPU kernels only" in line
    assert "FASTOPT_CUDA=1" in line


def test_with_a_gpu_its_architecture_is_built_for(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "gpus", lambda: ["90"])
    assert script.cuda().archs == ("90",)
    assert list(script.cuda().arch_flags()) == ["-gencode=arch=compute_90,code=sm_90"]


def test_nvidia_smi_is_believed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = cuda_listing.build_script.__wrapped__().gpus  # type: ignore[union-attr]
    for said, archs in {"9.0\n8.6\n9.0\n": ["86", "90"], "12.0\n": ["120"], "No devices were found\n": []}.items():
        monkeypatch.setitem(gpus.__globals__, "said_by", lambda command, said=said: said)
        assert gpus() == archs


@pytest.mark.parametrize(
    ("name", "value", "archs"),
    [
        ("FASTOPT_CUDA", "1", ("80", "90", "100+PTX")),
        ("FASTOPT_CUDA_ARCHS", "8.0, 90", ("80", "90")),
        ("FASTOPT_CUDA_ARCHS", "90+PTX", ("90+PTX",)),
    ],
)
def test_what_was_asked_for_needs_no_gpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: str, archs: tuple[str, ...]
) -> None:
    monkeypatch.setenv(name, value)
    assert script.cuda().archs == archs
    assert script.cuda().mixes == cuda_listing.MIXES


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"FASTOPT_CUDA": "yes"}, "FASTOPT_CUDA='yes': accepted are auto, 0 and 1"),
        ({"FASTOPT_CUDA_ARCHS": "sm_90"}, "'sm_90' is none; accepted are lists such as 80;90;100"),
        ({"FASTOPT_CUDA_ARCHS": "75"}, "'75' is too old; kernels are for 80 and later"),
        ({"FASTOPT_CUDA": "1", "FASTOPT_CUDA_MIXES": "f32;f8"}, "unknown f8; known are f32, f64"),
    ],
)
def test_bad_settings(script: ModuleType, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], said: str) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=said):
        script.cuda()


def test_no_nvcc(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(script, "find_nvcc", lambda: None)
    monkeypatch.setattr(script, "gpus", lambda: ["90"])
    assert script.cuda() is None
    assert "no nvcc: set CUDA_HOME" in capsys.readouterr().err
    monkeypatch.setenv("FASTOPT_CUDA", "1")
    with pytest.raises(SystemExit, match="asked for, but there is no nvcc"):
        script.cuda()


def test_a_gpu_that_nvcc_does_not_know(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "gpus", lambda: ["121"])
    assert script.cuda() is None
    assert "cannot compile for sm_121" in capsys.readouterr().err


def test_mixes_for_any_storage_are_always_built(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOPT_CUDA", "1")
    monkeypatch.setenv("FASTOPT_CUDA_MIXES", "bf16;f32")
    assert script.cuda().mixes == ("f32", "bf16", "any_f32", "any_f64")


def test_builds_share_all_objects_but_the_devices(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back and forth between two builds compiles nothing again: an object's name says all that it depends on."""
    torch = script.Torch.find()
    assert torch is not None
    objects: dict[str, object] = {}
    names = []
    for settings in ({}, {"FASTOPT_EMULATOR": "1"}, {"FASTOPT_CUDA": "1"}, {"FASTOPT_CUDA_ARCHS": "90"}):
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        units = list(script.units(torch))
        names.append({unit.object for unit in units})
        assert len(names[-1]) == len(units)
        for unit in units:
            assert objects.setdefault(unit.object, unit) == unit
    plain, emulated, every_arch, one_arch = names
    assert plain - emulated == plain - every_arch == {"absent_drivers.o"}
    assert len(every_arch - one_arch) == len(cuda_listing.MIXES) + 1
    assert {"module.o", "plan.o", "cpu_kernels.baseline.o"} <= plain & emulated & every_arch & one_arch


def test_a_ninja_whose_wheel_does_not_know_where_it_is(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in pip's isolated builds: the module is there, its program on PATH, and BIN_DIR empty."""
    (ninja := tmp_path / "ninja").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR=""))  # type: ignore[arg-type]
    assert script.find_ninja() == str(ninja)
