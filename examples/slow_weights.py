"""Lookahead and Ranger keep two sets of weights: the fast ones explore, the slow ones follow. Which do better at the
end differs from task to task, so it is worth measuring both; Lookahead's published results are the slow weights'.

Inside ``with optimizer.slow_weights():`` the model holds the slow weights; afterwards training goes on from the fast.
"""

from statistics import fmean

import fastopt
from fastopt.tools import tasks

STEPS = 602
task = tasks.get("digits")


def make_lookahead(params: list) -> fastopt.Lookahead:
    return fastopt.Lookahead(fastopt.Adam(params, lr=3e-2), k=5, alpha=0.5)


def make_ranger(params: list) -> fastopt.Ranger:
    return fastopt.Ranger(params, lr=1e-1)


for name, make in {"Lookahead(Adam)": make_lookahead, "Ranger": make_ranger}.items():
    model = task.make_model(seed=0)
    optimizer = make(list(model.parameters()))
    fast, slow = [], []
    for step, batch in zip(range(1, STEPS), task.batches(seed=0), strict=False):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
        if step % 40 == 38:  # neither 5 nor 6 divides it: between two synchronisations the weights differ
            fast.append(task.evaluate(model)["test_loss"])
            with optimizer.slow_weights():
                slow.append(task.evaluate(model)["test_loss"])
            if step % 120 == 38:
                print(f"{name:>15}  step {step:4}: held-out loss {fast[-1]:.4f} fast, {slow[-1]:.4f} slow")
    late = len(fast) // 2  # early on the loss falls so fast that the slow weights are merely late
    means = f"{fmean(fast[-late:]):.4f} fast, {fmean(slow[-late:]):.4f} slow"
    print(f"{name:>15}  mean of the last {late}: held-out loss {means}\n")
