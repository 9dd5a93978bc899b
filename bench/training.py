"""End to end: a small transformer and a small convnet trained on real data with torch.optim and with fastopt.

Twins: the same weights, batches and options for every contender. They take turns within every step, in an order that
rotates, and each does its own forward and backward. On a GPU the host waits for the device before and after
`optimizer.step()`, so that its time is its own; training is somewhat slower for that, for all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench import gpu_clocks
from bench.contenders import OURS, Contender, ours, rivals
from bench.race import Measurement, Samples, Spread, order
from bench.rules import RULES, Kind
from fastopt.tools import tasks
from fastopt.tools.demo import Lane
from fastopt.tools.tasks import Batch, Task

SEED = 0
WARM_UP = 10
LAST = 20  # training losses that the final one is the mean of


@dataclass(frozen=True)
class Training:
    """`task` gives the data and a model of a width for the device."""

    name: str
    model: str
    task: Callable[[str], Task]
    kind: Kind
    lr: float
    steps: int = 120


def transformer(device: str) -> Task:
    """Characters of Python's manual; on a GPU the width and depth of GPT-2 small."""
    task = tasks.chars()
    symbols = task.build().symbol.num_embeddings
    width, layers, heads = (768, 12, 12) if device == "cuda" else (32, 2, 2)
    return replace(task, build=lambda: tasks.CharTransformer(int(symbols), 32, width, layers, heads))


class ConvNet(nn.Module):
    """Residual blocks of two convolutions with batch normalisation on 8x8 pixels."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )
        self.out = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels.view(-1, 1, 8, 8))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.out(x.mean(dim=(2, 3)))


def convnet(device: str) -> Task:
    """Handwritten digits."""
    width, blocks = (256, 16) if device == "cuda" else (16, 4)
    return replace(tasks.digits(), build=lambda: ConvNet(width, blocks))


TRAININGS = (
    Training("transformer adamw", "transformer", transformer, RULES["AdamW"], 1e-3),
    Training("transformer radam", "transformer", transformer, RULES["RAdam"], 3e-3),
    Training("convnet adamw", "convnet", convnet, RULES["AdamW"], 1e-3),
    Training("convnet radam", "convnet", convnet, RULES["RAdam"], 3e-3),
)


def contenders(training: Training) -> list[Contender]:
    name, hyper = training.kind.name, {**training.kind.hyper, "lr": training.lr}
    return [ours(name, hyper), *rivals("fast", name, hyper)]


def measure(training: Training, device: str = "cpu", steps: int | None = None) -> list[Measurement]:
    task = training.task(device)
    lanes = []
    for contender in contenders(training):
        model = task.make_model(SEED).to(device)
        lanes.append(Lane(contender.label, model, contender.make([{"params": list(model.parameters())}])))
    samples = _train(lanes, task, device, training.steps if steps is None else steps)
    return _measurements(lanes, samples)


def _train(lanes: list[Lane], task: Task, device: str, steps: int) -> Samples:
    samples, batches = Samples(), _on(device, task.batches(SEED))
    for step in range(steps):
        batch = next(batches)
        for lane in order(lanes, step):
            lane.advance(task, batch, gpu_clocks.synchronize)
            if step >= min(WARM_UP, steps // 2):
                samples.add(lane.label, lane.iteration_seconds[-1])
    return samples


def _on(device: str, batches: Iterator[Batch]) -> Iterator[Batch]:
    for x, y in batches:
        yield x.to(device), y.to(device)


def _measurements(lanes: list[Lane], samples: Samples) -> list[Measurement]:
    measured: list[Measurement] = []
    for lane in lanes:
        whole = samples.seconds[lane.label]
        own = lane.step_seconds[-len(whole) :]
        measured += [
            (lane.label, "training_us", samples.time(lane.label).scaled(1e6)),
            (lane.label, "us_per_step", Spread.of(own).scaled(1e6)),
            (lane.label, "part_of_training", Spread.of([a / b for a, b in zip(own, whole, strict=True)])),
            (lane.label, "final_loss", statistics.fmean(lane.losses[-LAST:])),
        ]
        if lane.label != OURS:
            measured.append((OURS, f"speedup/{lane.label}", samples.ratio(lane.label, OURS)))
    return measured
