"""ArithmeticChain: a toy of verifiable reasoning, with a 60 k-parameter transformer that needs a minute of one core.

A prompt holds one to eight digits; the answer is their sum modulo 10. A completion is a style token, a body and an end
token, and is right if the token before the end is the answer. Hard prompts (more digits) are solved rarely. The reward
looks at the last digit only, so a wrong calculation that ends on the right digit counts: an imperfect verifier, on
purpose.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 27  # digits in font A 0-9 and in font B 10-19, then:
EQUALS, LEFT, DIRECT, BOS, EOS, PAD, GIVE_UP = range(20, 27)
MAX_DIGITS = 8
PROMPT_LENGTH, RESPONSE_LENGTH = 10, 9


def make_problems(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw problems whose number of digits is uniform in 1 ... 8.

    Returns:
        Prompts int64 ``[num, 10]`` (BOS, digits, padding, equals), answers ``[num]``, numbers of digits ``[num]``.
    """
    k = torch.randint(1, MAX_DIGITS + 1, (num,), generator=generator)
    digits = torch.randint(10, (num, MAX_DIGITS), generator=generator)
    used = torch.arange(MAX_DIGITS) < k[:, None]
    prompts = torch.full((num, PROMPT_LENGTH), EQUALS)
    prompts[:, 0] = BOS
    prompts[:, 1:-1] = torch.where(used, digits, PAD)
    return prompts, (digits * used).sum(1) % 10, k


def demonstrations(prompts: Tensor, k: Tensor, answers: Tensor, generator: torch.Generator) -> Tensor:
    """Imperfect solutions for the base model to imitate, int64 ``[n, 9]``.

    With probability 0.15 one digit, right with probability 1 for a single digit and ``0.1 + 0.4/k`` else; otherwise the
    running sums, each of them wrong with probability 0.2, with a chance of 0.2 to give up before each.
    """
    n = len(prompts)

    def chance(p: Tensor | float) -> Tensor:
        return torch.rand(n, generator=generator) < p

    def wrong(digit: Tensor) -> Tensor:
        return (digit + torch.randint(1, 10, (n,), generator=generator)) % 10

    def font(digit: Tensor) -> Tensor:  # two ways to write a digit give right answers different gradients
        return digit + 10 * torch.randint(2, (n,), generator=generator)

    direct = chance(0.15)
    response = torch.full((n, RESPONSE_LENGTH), PAD)
    response[:, 0] = torch.where(direct, DIRECT, LEFT)
    right = chance(torch.where(k == 1, 1.0, 0.1 + 0.4 / k))
    response[:, 1] = font(torch.where(direct, torch.where(right, answers, wrong(answers)), prompts[:, 1]))
    response[:, 2] = EOS  # of the direct style and of the single digit
    total, going = prompts[:, 1], ~direct & (k > 1)
    for step in range(2, MAX_DIGITS + 1):
        active = going & (k >= step)
        stop = active & chance(0.2)
        total = torch.where(active, (total + prompts[:, step]) % 10, total)
        total = torch.where(active & chance(0.2), wrong(total), total)
        token = torch.where(stop, GIVE_UP, font(total))
        response[:, step - 1] = torch.where(active, token, response[:, step - 1])
        ends = active & (stop | (k == step))
        response[:, step] = torch.where(ends, EOS, torch.where(active, PAD, response[:, step]))
        going = going & ~ends
    return response


def reward_of(responses: Tensor, answers: Tensor) -> Tensor:
    """1 where the token just before the first end token is the answer in either font, else 0; float32 ``[n]``."""
    ends = responses == EOS
    at = ends.long().argmax(1)
    before = responses.gather(1, (at - 1).clamp_min(0)[:, None])[:, 0]
    right = ends.any(1) & (at > 0) & (before < 20) & (before % 10 == answers)
    return right.float()


def response_mask(responses: Tensor) -> Tensor:
    """1 up to and including the first end token, all ones without one; int64, of the same shape."""
    ends = (responses == EOS).long()
    return (ends.cumsum(1) - ends == 0).long()


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        n, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        # one new token may look at everything; several, at what is before them
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, dim))
        return x + self.down(F.relu(self.up(self.norm2(x)))), (k, v)


class ChainTransformer(nn.Module):
    """Decoder-only transformer, pre-LN, learned positions, bias-free head; 60 144 parameters by default."""

    def __init__(self, dim: int = 48, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Embedding(PROMPT_LENGTH + RESPONSE_LENGTH, dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.5)
        self.blocks = nn.ModuleList(_Block(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)

    def hidden(self, tokens: Tensor, past: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """Inputs of the head ``[n, T, dim]``, and the keys and values to continue from."""
        start = 0 if past is None else past[0][0].shape[2]
        x = self.embedding(tokens) + self.position.weight[start : start + tokens.shape[1]]
        cache = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, None if past is None else past[i])
            cache.append(kv)
        return self.norm(x), cache

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[n, T, 27]``."""
        logits: Tensor = self.head(self.hidden(tokens)[0])
        return logits

    def response_hidden_and_logits(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of the head at the nine positions that predict the response."""
        hidden = self.hidden(torch.cat([prompts, responses[:, :-1]], 1))[0][:, PROMPT_LENGTH - 1 :]
        return hidden, self.head(hidden)

    @torch.no_grad()
    def sample(self, prompts: Tensor, counts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``counts[i]`` responses of every prompt, grouped by prompt, with cached keys and values.

        Returns:
            Responses int64 ``[sum(counts), 9]`` and the log-probability of each token.
        """
        hidden, cache = self.hidden(prompts)
        counts = counts.to(prompts.device)
        last = hidden[:, -1].repeat_interleave(counts, 0)
        cache = [(k.repeat_interleave(counts, 0), v.repeat_interleave(counts, 0)) for k, v in cache]
        ended = torch.zeros(len(last), dtype=torch.bool, device=last.device)
        tokens, logprobs = [], []
        for step in range(RESPONSE_LENGTH):
            logp = torch.log_softmax(self.head(last).float(), 1)
            # Gumbel-max: one draw per entry, far cheaper than multinomial on many short rows
            noise = torch.empty(logp.shape).exponential_(generator=generator).to(logp.device)
            token = (logp - noise.log()).argmax(1)
            token = torch.where(ended, PAD, token)
            tokens.append(token)
            logprobs.append(torch.where(ended, 0.0, logp.gather(1, token[:, None])[:, 0]))
            ended = ended | (token == EOS)
            if step + 1 < RESPONSE_LENGTH:
                hidden, cache = self.hidden(token[:, None], cache)
                last = hidden[:, -1]
        return torch.stack(tokens, 1), torch.stack(logprobs, 1)


def train_base(model: Any, steps: int = 800, seed: int = 0, batch_size: int = 128) -> None:
    """Teach the model to imitate :func:`demonstrations`; 800 steps take about a minute on one core.

    AdamW, learning rate 4e-3 with 50 steps of warm-up and a cosine to 0, gradient norm clipped to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        prompts, answers, k = make_problems(batch_size, generator)
        responses = demonstrations(prompts, k, answers, generator)
        logits = model.response_hidden_and_logits(prompts, responses)[1]
        mask = response_mask(responses).bool()
        loss = F.cross_entropy(logits[mask], responses[mask])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
