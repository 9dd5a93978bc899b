"""Train with Adam until it stalls, then hand its parameters to SGD: `fastopt.convert(optimizer, fastopt.SGD, lr=...)`.

From the moment of the hand-over a copy goes on with Adam, so that the numbers say whether SGD was worth it here.
"""

import copy
from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

import fastopt
from fastopt.tools import tasks

ROUND = 50
PATIENCE = 3
"""Adam has stalled when the held-out loss found no new minimum for 3 rounds of 50 steps."""

task = tasks.get("digits")


def train(model: nn.Module, optimizer: Optimizer, batches: Iterator[tasks.Batch]) -> float:
    """Train for one round and return the held-out loss."""
    for _, batch in zip(range(ROUND), batches, strict=False):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    return task.evaluate(model)["test_loss"]


model = task.make_model(seed=0)
adam = fastopt.Adam(model.parameters(), lr=1e-2)
batches = task.batches(seed=0)
history = [train(model, adam, batches)]
while len(history) - history.index(min(history)) <= PATIENCE:
    history.append(train(model, adam, batches))
    print(f"Adam  step {len(history) * ROUND:4}  held-out loss {history[-1]:.4f}")
print(f"Adam stalled: no progress in {PATIENCE * ROUND} steps, best {min(history):.4f}\n")

twin, twin_adam = copy.deepcopy((model, adam))
sgd = fastopt.convert(adam, fastopt.SGD, lr=0.05, momentum=0.9)
ends = {"sgd": history[-1], "adam": history[-1]}
for number in range(1, 7):
    ends = {"sgd": train(model, sgd, task.batches(number)), "adam": train(twin, twin_adam, task.batches(number))}
    print(f"{number * ROUND:4} steps later: SGD {ends['sgd']:.4f}   Adam, had it gone on, {ends['adam']:.4f}")
print(f"Lower in the end, for this problem and this seed: {'SGD' if ends['sgd'] < ends['adam'] else 'Adam'}")
