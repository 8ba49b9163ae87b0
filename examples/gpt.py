"""A small byte-level GPT in plain PyTorch, and the text that every Python installation has.

Nothing here knows of distributed training: `demo.py` wraps it into DistributedDataParallel.
"""

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

VOCABULARY = 256
_TEXT_BYTES_MAX = 6 << 20
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class GptConfig:
    """The shape of the model; `context` is in bytes."""

    context: int = 128
    width: int = 128
    heads: int = 4
    layers: int = 4


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, each behind a norm and around a residual."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.forward_norm = nn.LayerNorm(config.width)
        self.widen = nn.Linear(config.width, 4 * config.width)
        self.narrow = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, bytes, width) to the same shape."""
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        mixed = self.query_key_value(self.attention_norm(x)).view(shape)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(seen.transpose(1, 2).reshape(batch, length, width))
        widened: Tensor = functional.gelu(self.widen(self.forward_norm(x)))
        added: Tensor = x + self.narrow(widened)
        return added


class Gpt(nn.Module):
    """Bytes in, scores of the next byte out."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(VOCABULARY, config.width)
        self.place = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Linear) else 0.05)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length <= context) int64 to (batch, length, VOCABULARY) float32 scores."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.place(places)
        for block in self.blocks:
            x = block(x)
        # The output layer shares the embedding's weights.
        return functional.linear(self.norm(x), self.token.weight)

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte."""
        return functional.cross_entropy(scores.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, prompt: str, length: int, seed: int, temperature: float = 0.7) -> str:
        """`prompt` and `length` more bytes drawn from the model, as text."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([list(prompt.encode())])
        for _ in range(length):
            scores = self(tokens[:, -self.config.context :])[0, -1] / temperature
            chosen = torch.multinomial(scores.softmax(0), 1, generator=generator)
            tokens = torch.cat([tokens, chosen[None]], 1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


def standard_library_text(nbytes_max: int = _TEXT_BYTES_MAX) -> bytes:
    """The source of Python's standard library, in a fixed order. RuntimeError if there is none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    total = 0
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(root).parts):
            continue
        parts.append(path.read_bytes())
        total += len(parts[-1])
        if total >= nbytes_max:
            break
    if total < 1 << 16:
        raise RuntimeError(f"{root} holds no source text of Python's standard library to train on")
    return b"\n".join(parts)[:nbytes_max]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text at random places; each rank draws its own, the same ones in every run."""

    def __init__(self, text: bytes, context: int, count: int, rank: int, seed: int) -> None:
        """`count` windows of `context` bytes. ValueError if the text is shorter than a window."""
        if len(text) < context + 2:
            raise ValueError(f"a text of {len(text)} bytes holds no window of {context + 1}")
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._context = context
        generator = torch.Generator().manual_seed(seed * 100_003 + rank)
        self._starts = torch.randint(len(text) - context - 1, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(context,) input bytes and the (context,) bytes that follow each of them, int64."""
        start = int(self._starts[index])
        window = self._text[start : start + self._context + 1].long()
        return window[:-1], window[1:]


def learning_rate_share(step: int, steps: int) -> float:
    """The share of the top learning rate at `step`: a short rise, then half a cosine to 0.1."""
    rise = max(1, min(20, steps // 10))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
