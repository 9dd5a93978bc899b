"""The real trainers: Hugging Face's Trainer, Accelerate and Lightning, with clipping, schedules and resumes.

On a CPU, or with FASTOPT_TEST_DEVICE=cuda on a GPU. They are large and not among the test dependencies: each test is
skipped where its package is missing.
`pip install accelerate lightning transformers` (with the installed torch named again) brings all three.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import backends
from harness import difference

import fastopt

DEVICE = os.environ.get("FASTOPT_TEST_DEVICE", "cpu")
Make = Callable[[Any], Any]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda ps: fastopt.AdamW(ps, lr=0.01),
    "adamw-fused": lambda ps: fastopt.AdamW(ps, lr=0.01, fused=True),
    "sgd": lambda ps: fastopt.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "nadam": lambda ps: fastopt.NAdam(ps, lr=0.01),
    "ranger": lambda ps: fastopt.Ranger(ps, lr=0.05),
    "lookahead": lambda ps: fastopt.Lookahead(fastopt.RAdam(ps, lr=0.05), k=3),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
pytestmark = [
    pytest.mark.contract("wrappers"),
    pytest.mark.filterwarnings("ignore"),  # the trainers' own: few workers, no logger, torch's renamed functions
]


def package(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def batches(device: str = "cpu") -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(4, 4, generator=generator) for _ in range(8)]
    return [(x.to(device), x.sum(1, keepdim=True).sin().to(device)) for x in xs]


def parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().cpu() for p in model.parameters()]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(not difference(p, q) for p, q in zip(a, b, strict=True))


def plainly(make: Make, clip: float, gamma: float = 1.0, repeat: int = 1) -> list[torch.Tensor]:
    """The training loop without any trainer."""
    model = network().to(DEVICE)
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    for _ in range(repeat):
        for x, y in batches(DEVICE):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
    return parameters(model)


@each_optimizer
def test_accelerate(name: str, tmp_path: pathlib.Path) -> None:
    """prepare, clip, step and schedule through Accelerate are the plain loop; a run resumed in the middle too."""
    accelerate = package("accelerate")
    make = OPTIMIZERS[name]

    def prepared() -> Any:
        accelerator = accelerate.Accelerator(cpu=DEVICE == "cpu")
        model = network()
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler)

    def train(parts: Any, given: Any) -> None:
        accelerator, model, optimizer, scheduler = parts
        for x, y in given:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                assert not optimizer.step_was_skipped

    parts = prepared()
    train(parts, batches(DEVICE)[:4])
    parts[0].save_state(str(tmp_path / "state"))
    train(parts, batches(DEVICE)[4:])
    whole = parameters(parts[1])
    assert_same(whole, plainly(make, 0.5, 0.9))
    again = prepared()
    again[0].load_state(str(tmp_path / "state"))
    train(again, batches(DEVICE)[4:])
    assert_same(parameters(again[1]), whole)


@pytest.fixture
def accelerate_anew() -> Iterator[Any]:
    """Accelerate keeps for the process the precision that it was first asked for."""
    accelerate = package("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.contract("wrappers", "amp")
@pytest.mark.skipif(DEVICE != "cuda", reason="Accelerate has fp16 on a GPU only")
@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
def test_accelerate_in_fp16(name: str, accelerate_anew: Any) -> None:
    """With a scale that overflows at first: steps are skipped, and said to be, until it has come down."""
    scaling = accelerate_anew.utils.GradScalerKwargs(init_scale=2.0**30, backoff_factor=2.0**-6)
    accelerator = accelerate_anew.Accelerator(mixed_precision="fp16", kwargs_handlers=[scaling])
    model = network()
    model, optimizer = accelerator.prepare(model, OPTIMIZERS[name](model.parameters()))
    losses, overflows = [], 0
    for x, y in batches(DEVICE) * 20:
        scale, before = accelerator.scaler.get_scale(), parameters(model)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
        overflow = accelerator.scaler.get_scale() < scale
        overflows += overflow
        # A fused optimizer is called all the same and skips by itself, torch's too, which Accelerate takes for a step.
        assert optimizer.step_was_skipped == (overflow and "fused" not in name)
        assert overflow == all(torch.equal(p, q) for p, q in zip(parameters(model), before, strict=True))
    assert 0 < overflows < 8
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])
    assert all(p.isfinite().all() for p in parameters(model))


class Regressor(torch.nn.Module):
    """A model as Hugging Face's Trainer wants it: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x)
        return {"loss": torch.nn.functional.mse_loss(out, labels), "logits": out}


CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fastopt.AdamW, {"lr": 0.01}),
    "RAdam": (fastopt.RAdam, {"lr": 0.01, "decoupled_weight_decay": True}),
    "Ranger": (fastopt.Ranger, {"lr": 0.05}),
}


@pytest.mark.parametrize("how", [*CLASSES, "Lookahead"])
def test_hugging_face_trainer(how: str, tmp_path: pathlib.Path) -> None:
    """optimizer_cls_and_kwargs, or a made optimizer; stopped after a checkpoint and resumed to the same bits."""
    transformers = package("transformers")
    package("accelerate")
    data = [{"x": x, "labels": y} for batch in batches() for x, y in zip(*batch, strict=True)]

    def trainer(folder: str, steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), use_cpu=DEVICE == "cpu", max_steps=12, per_device_train_batch_size=4,
            seed=3, weight_decay=0.01, max_grad_norm=0.5, save_steps=6, logging_steps=100, report_to=[],
            disable_tqdm=True, lr_scheduler_type="linear",
        )  # fmt: skip
        model = Regressor()
        kwargs: dict[str, Any] = {}
        if how == "Lookahead":
            optimizer = OPTIMIZERS["lookahead"](model.parameters())
            kwargs["optimizers"] = (optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12))
        else:
            kwargs["optimizer_cls_and_kwargs"] = CLASSES[how]

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                control.should_training_stop = state.global_step >= steps

        return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Stop()], **kwargs)

    whole = trainer("whole", 12)
    whole.train()
    cut = trainer("cut", 6)
    cut.train()
    resumed = trainer("cut", 12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-6"))
    assert resumed.state.global_step == 12
    assert_same(parameters(resumed.model), parameters(whole.model))
    if how in CLASSES:
        inner = resumed.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        assert type(inner) is CLASSES[how][0]
        assert len(inner.param_groups) == 2


@each_optimizer
def test_lightning(name: str, tmp_path: pathlib.Path) -> None:
    """Automatic optimisation steps with a closure, and clips in it; a run resumed at an epoch is the plain loop too."""
    lightning = package("lightning")
    make = OPTIMIZERS[name]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x, y = batch
            return torch.nn.functional.mse_loss(self.net(x), y)

        def configure_optimizers(self) -> Any:
            optimizer = make(self.parameters())
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            accelerator="cpu" if DEVICE == "cpu" else "gpu", devices=1, max_epochs=epochs, logger=False,
            enable_checkpointing=False, gradient_clip_val=0.5, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=str(tmp_path),
        )  # fmt: skip

    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    first, module = trainer(1), Module()
    first.fit(module, loader)
    first.save_checkpoint(str(tmp_path / "epoch.ckpt"))
    resumed = Module()
    trainer(2).fit(resumed, loader, ckpt_path=str(tmp_path / "epoch.ckpt"))
    assert_same(parameters(resumed), plainly(make, 0.5, 0.9, repeat=2))


@pytest.mark.contract("wrappers", "amp")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("backend", backends())
def test_lightnings_check_of_clipping_under_amp(fused: bool, backend: str) -> None:
    """It refuses to clip for an optimizer that unscales gradients itself: exactly when fused=True was asked for."""
    package("lightning")
    from lightning.pytorch.plugins.precision.amp import MixedPrecision

    optimizer = fastopt.Adam([torch.nn.Parameter(torch.ones(3))], fused=fused, backend=backend)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with (
        pytest.raises(RuntimeError, match="does not allow for gradient clipping") if fused else contextlib.nullcontext()
    ):
        plugin.clip_gradients(optimizer, 0.5)
