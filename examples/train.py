"""Two small training loops over the feed of a Headrace exchange: a linear model on tables, a Transformer on tokens."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from headrace.torch import StreamingDataLoader, StreamingDataset

Report = Callable[[int, float, float], None]


@dataclass(frozen=True)
class Trained:
    """How a training went: loss at its beginning, end and on unseen rows, and what the feed delivered."""

    first: float
    last: float
    unseen: float
    samples: int
    seconds: float
    parameters: int
    steps: int


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _mean_loss(loss: Callable[[dict[str, torch.Tensor]], torch.Tensor], data: StreamingDataset) -> float:
    return float(torch.stack([loss(batch) for batch in StreamingDataLoader(data)]).mean())


def train_linear(source: str, token: str, cache: str, epochs: int, report: Report) -> Trained:
    """Fit ``label`` from ``features`` (float32 [rows, 10]) by least squares; reports the mean loss of each epoch."""
    torch.manual_seed(0)
    train = StreamingDataset(f"{source}:train", token, batch_size=32, seed=0, cache_dir=cache)
    val = StreamingDataset(f"{source}:val", token, batch_size=8, shuffle=False, cache_dir=cache)
    loader = StreamingDataLoader(train)
    model = nn.Linear(train[0]["features"].shape[0], 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional.mse_loss(model(batch["features"]).squeeze(1), batch["label"])

    losses, samples, began = [], 0, time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for batch in loader:
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
            samples += len(batch["label"])
        losses.append(total / len(loader))
        report(epoch, losses[-1], samples / (time.perf_counter() - began))
    seconds = time.perf_counter() - began
    return Trained(
        losses[0], losses[-1], _mean_loss(loss_of, val), samples, seconds, _parameters(model), epochs * len(loader)
    )


class SmallTransformer(nn.Module):
    """A causal language model: tokens int64 [batch, length] to logits float32 [batch, length, vocabulary]."""

    def __init__(self, vocabulary: int, length: int, width: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits of each next token; input and output embeddings are the same matrix."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.blocks(self.tokens(tokens) + self.places[:length], mask=mask, is_causal=True)
        return hidden @ self.tokens.weight.T


def train_transformer(
    source: str, token: str, cache: str, vocabulary: int, report: Report, steps: int = 150, seconds: float = 25.0
) -> Trained:
    """Train on packed ``tokens`` for ``steps`` steps or ``seconds``, whichever ends first; reports ten times or so."""
    torch.manual_seed(0)
    options = {"columns": ["tokens"], "batch_size": 16, "cache_dir": cache}
    data = StreamingDataset(f"{source}:train", token, seed=0, **options)
    val = StreamingDataset(f"{source}:val", token, shuffle=False, **options)
    model = SmallTransformer(vocabulary, data[0]["tokens"].shape[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = batch["tokens"]
        return functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    losses: list[float] = []
    began, told = time.perf_counter(), 0.0
    for batch in itertools.islice(_for_ever(StreamingDataLoader(data)), steps):
        passed = time.perf_counter() - began
        done = max(len(losses) / steps, passed / seconds)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (len(losses) + 1) / 10) * (1 - 0.9 * done)
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if done >= told:
            told += 0.1
            report(len(losses), _recent(losses), 16 * len(losses) / (time.perf_counter() - began))
    passed = time.perf_counter() - began
    return Trained(
        losses[0], _recent(losses), _mean_loss(loss_of, val), 16 * len(losses), passed, _parameters(model), len(losses)
    )


def _for_ever(loader: StreamingDataLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def _recent(losses: list[float]) -> float:
    return sum(losses[-5:]) / len(losses[-5:])
