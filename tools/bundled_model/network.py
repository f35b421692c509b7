"""Llama network for training: fused projections, no cache. Knows no text and no optimizer.

Exported weights give the same logits in any implementation of Llama (Touvron et al. 2023) with grouped-query attention
(Ainslie et al. 2023): RMSNorm before each block, rotary positions on half-rotated heads, SwiGLU, tied embeddings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; the defaults are the bundled model's."""

    vocab_size: int = 4_096
    hidden: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 768
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


def rotary_table(num_positions: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [num_positions, head_dim]; both halves of a row are equal."""
    inverse_frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angle = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse_frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, computed in slabs of query rows, each only with the keys that it can see.

    q  [batch, num_heads, length, head_dim]; k, v  [batch, num_kv_heads, length, head_dim]; result: shape of q.
    On processors without matrix tiles this takes half the time of torch's own attention in bfloat16.
    """
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads = k.shape[1]
    rows = 256 if length <= 1_024 else 512
    q = q.view(batch, num_kv_heads, num_heads // num_kv_heads, length, head_dim) * head_dim**-0.5
    future = torch.full((rows, rows), float("-inf"), dtype=q.dtype).triu(1)
    blocks = []
    for start in range(0, length, rows):
        some = q[:, :, :, start : start + rows]
        size = some.shape[3]
        end = start + size
        scores = some.reshape(batch, num_kv_heads, -1, head_dim) @ k[:, :, :end].transpose(-1, -2)
        scores = scores.view(batch, num_kv_heads, -1, size, end)
        scores[..., start:] += future[:size, :size]
        mixed = scores.softmax(dim=-1).view(batch, num_kv_heads, -1, end) @ v[:, :, :end]
        blocks.append(mixed.view(batch, num_heads, size, head_dim))
    return torch.cat(blocks, dim=2)


def _cross_entropy(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, embedding).float()
    return F.cross_entropy(logits.view(-1, embedding.shape[0]), targets.reshape(-1))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.sizes = (q_size, kv_size, kv_size)
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.qkv = nn.Linear(shape.hidden, sum(self.sizes), bias=False)
        self.out = nn.Linear(q_size, shape.hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute the layer: x  [batch, length, hidden] -> same shape."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
        q, k, v = qkv.split([size // self.shape.head_dim for size in self.sizes], dim=1)
        mixed = causal_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out


class Network(nn.Module):
    """Network from token ids to logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self._cross_entropy = _cross_entropy
        self._tables: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._initialise()

    def _initialise(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            for writer in (block.out, block.down):  # outputs to the residual stream start at zero
                nn.init.zeros_(writer.weight)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Compute the normalised last hidden state [batch, length, hidden] of tokens [batch, length]."""
        x = self.embedding(tokens)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        key = (tokens.shape[1], dtype)
        if key not in self._tables:
            cos, sin = rotary_table(tokens.shape[1], self.shape)
            self._tables[key] = (cos.to(dtype), sin.to(dtype))
        for block in self.blocks:
            x = block(x, *self._tables[key])
        out: Tensor = self.norm(x)
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits [batch, length, vocab_size] of tokens [batch, length]."""
        return F.linear(self.hidden(tokens), self.embedding.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of `targets` [batch, length], in nats."""
        return self._cross_entropy(self.hidden(tokens), self.embedding.weight, targets)

    def compile_parts(self) -> None:
        """Compile each layer and the loss separately, once per sequence length: takes seconds, doubles the speed."""
        for block in self.blocks:
            block.compile(dynamic=False)
        self._cross_entropy = torch.compile(_cross_entropy, dynamic=False)
