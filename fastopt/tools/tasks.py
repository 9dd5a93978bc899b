"""Two small, real training tasks on data that comes with installed packages: nothing is downloaded.

``digits``: 1,797 handwritten digits of 8x8 pixels (ships in scikit-learn) and a two-layer perceptron.
``chars``: the text of Python's own manual (``pydoc_data.topics``) and a character-level transformer.

The same seed gives the same bits: ``Task.make_model(seed)`` draws the initial weights, ``Task.batches(seed)`` the order
of the data, the held-out part is the same for every seed, and the global random state is left as it was.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastopt.report import need

Batch = tuple[Tensor, Tensor]

MOST_THREADS_A_CORE = 4


@dataclass(frozen=True)
class Task:
    """A training problem: a model, an endless stream of batches, a loss to minimise and a held-out evaluation.

    ``build`` makes the model from torch's global random state; ``loss`` is a scalar in nats; the first value that
    ``evaluate`` returns is the score (lower is better), the others are for reading.
    """

    name: str
    description: str
    build: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]

    def make_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()


def get(name: str) -> Task:
    """The task of that name. Raises ValueError for an unknown name, ModuleNotFoundError where its data is missing."""
    try:
        return TASKS[name]()
    except KeyError:
        raise ValueError(f"unknown task {name!r}: the tasks are {', '.join(TASKS)}") from None


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside, the mode of the model restored after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch inside."""
    if count < 1:
        raise ValueError(f"threads must be at least 1; got {count}")
    cores = os.cpu_count() or 1
    if count > MOST_THREADS_A_CORE * cores:  # torch takes any number, and the process dies when they are started
        raise ValueError(f"threads must be at most {MOST_THREADS_A_CORE * cores}, for {cores} cores; got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def digits() -> Task:
    """Classify 8x8 handwritten digits with a 64-64-10 perceptron, batches of 64; a fifth of the images is held out."""
    (train_x, train_y), held_out = _digits_data()

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.split(torch.randperm(len(train_x), generator=generator), 64):
                yield train_x[rows], train_y[rows]

    def evaluate(model: nn.Module) -> dict[str, float]:
        with inference(model):
            scores = model(held_out[0])
        accuracy = (scores.argmax(dim=1) == held_out[1]).double().mean().item()
        return {"test_loss": functional.cross_entropy(scores, held_out[1]).item(), "test_accuracy": accuracy}

    return Task(
        name="digits",
        description="8x8 handwritten digits, perceptron 64-64-10, batches of 64",
        build=lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        batches=batches,
        loss=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        evaluate=evaluate,
    )


@functools.cache
def _digits_data() -> tuple[Batch, Batch]:
    data = need("sklearn.datasets", "the digits task").load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, train = order[::5], order[torch.arange(len(x)) % 5 != 0]
    return (x[train], y[train]), (x[held_out], y[held_out])


def chars() -> Task:
    """Predict the next character of Python's manual with a small transformer; the last tenth is held out."""
    train, held_out, symbols = _manual()
    context, batch_size = 32, 32

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        within = torch.arange(context + 1)
        while True:
            starts = torch.randint(len(train) - context, (batch_size, 1), generator=generator)
            windows = train[starts + within]
            yield windows[:, :-1], windows[:, 1:]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def evaluate(model: nn.Module) -> dict[str, float]:
        windows = held_out[: len(held_out) // (context + 1) * (context + 1)].view(-1, context + 1)
        sample = windows[:: max(1, len(windows) // 256)]
        with inference(model):
            nats = loss(model, (sample[:, :-1], sample[:, 1:])).item()
        return {"bits_per_char": nats / math.log(2)}

    return Task(
        name="chars",
        description=f"Python's manual by the character, {symbols} symbols, transformer with 2 layers of width 32",
        build=lambda: CharTransformer(symbols, context),
        batches=batches,
        loss=loss,
        evaluate=evaluate,
    )


@functools.cache
def _manual() -> tuple[Tensor, Tensor, int]:
    topics = need("pydoc_data.topics", "the chars task").topics
    text = "\n".join(topics[name] for name in sorted(topics))
    index = {symbol: i for i, symbol in enumerate(sorted(set(text)))}
    codes = torch.tensor([index[symbol] for symbol in text])
    cut = len(codes) * 9 // 10
    return codes[:cut], codes[cut:], len(index)


class CharTransformer(nn.Module):
    """A pre-norm transformer; a short causal convolution in front learns the common letter groups within few steps."""

    def __init__(self, symbols: int, context: int, width: int = 32, layers: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.neighbours = nn.Conv1d(width, width, kernel_size=4)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, symbols)
        for embedding in (self.symbol, self.position):
            nn.init.normal_(embedding.weight, std=0.05)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.symbol(codes)
        x = x + self.neighbours(functional.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)
        x = x + self.position.weight[: codes.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.out(self.norm(x))
        return logits


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(x.shape))
        out: Tensor = x + self.contract(functional.gelu(self.expand(self.norm2(x))))
        return out


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "chars": chars}
