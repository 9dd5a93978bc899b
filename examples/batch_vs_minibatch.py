"""Batch, stochastic and mini-batch gradient descent are one optimizer: only the rows behind a gradient differ.

Each trains the same network on the same images for the same number of passes over the data.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastopt

EPOCHS = 3
WAYS = (("batch", None, 1.0), ("stochastic", 1, 0.02), ("mini-batch", 32, 0.2))
"""Name, rows per step (None: all of them) learning rate: the noisier gradient of fewer rows bears a smaller step."""

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
loss_of = nn.CrossEntropyLoss()


def train(rows_per_step: int | None, lr: float) -> tuple[int, list[float]]:
    """Return the number of steps and the loss over all images after each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = fastopt.SGD(model.parameters(), lr=lr)
    steps, history = 0, []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(rows_per_step or len(images)):
            optimizer.zero_grad()
            loss_of(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            steps += 1
        with torch.no_grad():
            history.append(loss_of(model(images), labels).item())
    return steps, history


train(None, lr=1.0)  # the first training in a process also loads code; it is not timed
print(f"{len(images)} images, {EPOCHS} passes over them; loss over all images after each pass:")
for name, rows_per_step, lr in WAYS:
    start = time.perf_counter()
    steps, history = train(rows_per_step, lr)
    losses = "  ".join(f"{loss:.3f}" for loss in history)
    seconds = time.perf_counter() - start
    print(f"{name:>10}: {rows_per_step or len(images):4} rows a step, {steps:4} steps, {seconds:5.2f} s   {losses}")
print("More steps learn more from a pass; larger batches make a pass cheaper. Mini-batches are the compromise.")
