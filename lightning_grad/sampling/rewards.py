"""Rewards that can be checked: numbers, boxed answers, mathematical equality; and how a reward function is called."""

from __future__ import annotations

import importlib
import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

RewardFn = Callable[[list[str], list[str], list[Any]], Any]
"""``(prompts, completions, references)``, three lists of length ``n``, to ``n`` numbers (a tensor or a list)."""

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


class ExactNumberReward:
    """1 if the last number in the completion equals the reference, else 0.

    Thousands separators and a trailing period do not count. A reference without a number cannot be judged: NaN.
    """

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Any]) -> Tensor:
        """Return one reward per completion."""
        pairs = zip(completions, references, strict=True)
        return torch.tensor([_judge(last_number(str(ref)), last_number(text)) for text, ref in pairs])


class BoxedAnswerReward:
    r"""1 if the last ``\boxed{...}`` of the completion has the text of the reference, white space aside, else 0.

    The reference may itself be boxed; an empty one cannot be judged: NaN.
    """

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Any]) -> Tensor:
        """Return one reward per completion."""
        rewards = []
        for text, reference in zip(completions, references, strict=True):
            inner = last_boxed(str(reference))
            wanted = _squeezed(str(reference) if inner is None else inner)
            found = last_boxed(text)
            rewards.append(_judge(wanted or None, None if found is None else _squeezed(found)))
        return torch.tensor(rewards)


class MathAnswerReward:
    r"""1 if the answer in the completion equals the reference as mathematics, else 0; by the package math-verify.

    ``0.5``, ``1/2`` and ``\frac{1}{2}`` are equal. Boxed answers are preferred, then formulas, then plain numbers. A
    reference that is not understood cannot be judged: NaN.

    Args:
        timeout_s: Seconds for one comparison; works in the main thread only, elsewhere there is no limit.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
    """

    def __init__(self, timeout_s: int = 5) -> None:
        try:
            import math_verify
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'MathAnswerReward needs math-verify: pip install "lightning-grad[hf]".'
            ) from error
        self.timeout_s = timeout_s
        self._parse, self._verify = math_verify.parse, math_verify.verify

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Any]) -> Tensor:
        """Return one reward per completion."""
        # the limit is an alarm signal, which Python delivers to the main thread only
        limit = self.timeout_s if threading.current_thread() is threading.main_thread() else None
        known: dict[str, Any] = {}
        rewards = []
        for text, reference in zip(completions, references, strict=True):
            key = str(reference)
            if key not in known:  # bare LaTeX is found between dollars only
                known[key] = self._parse(key if "$" in key or "\\boxed" in key else f"${key}$", parsing_timeout=limit)
            gold = known[key]
            if not gold:
                rewards.append(math.nan)
                continue
            found = self._parse(text, parsing_timeout=limit)
            rewards.append(float(bool(found) and self._verify(gold, found, timeout_seconds=limit)))
        return torch.tensor(rewards)


def last_number(text: str) -> float | None:
    """The last number in a text; ``None`` if there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def last_boxed(text: str) -> str | None:
    r"""Inside of the last ``\boxed{...}`` with balanced braces; ``None`` if there is none."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end]
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _judge(wanted: object, found: object) -> float:
    return math.nan if wanted is None else float(found == wanted)


def resolve_reward(reward: str | RewardFn) -> RewardFn:
    """A reward function from its import path, ``package.module.name``; a class is called without arguments.

    Raises:
        ValueError: There is nothing to call at that path.
    """
    if not isinstance(reward, str):
        found: Any = reward
    else:
        module, _, name = reward.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"`reward` must be the import path of a function (prompts, completions, references) -> rewards, got"
                f" {reward!r}: {error}."
            ) from error
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise ValueError(f"`reward` must be something to call, got {found!r}.")
    return found  # type: ignore[no-any-return]


def score(reward: RewardFn, prompts: list[str], completions: list[str], references: list[Any]) -> tuple[Tensor, str]:
    """Call a reward function, and let a sample on which it raises be one that cannot be judged.

    Returns:
        Rewards float32 ``[n]`` (NaN: could not be judged), and what went wrong first, ``""`` if nothing.

    Raises:
        ValueError: It returned something other than one number per completion.
        RuntimeError: It raised for every sample.
    """
    if not completions:
        return torch.zeros(0), ""
    try:
        return _numbers(reward(prompts, completions, references), len(completions), reward), ""
    except _WrongRewardError:
        raise
    except Exception as error:
        first: Exception = error
    rewards, failures = torch.full((len(completions),), torch.nan), 0
    for i, (prompt, completion, reference) in enumerate(zip(prompts, completions, references, strict=True)):
        try:
            rewards[i] = _numbers(reward([prompt], [completion], [reference]), 1, reward)[0]
        except _WrongRewardError:
            raise
        except Exception as error:
            first = error if not failures else first
            failures += 1
    if failures == len(completions):
        raise RuntimeError(
            f"the reward function {_name(reward)} raised for every one of {failures} samples; the first:"
            f" {type(first).__name__}: {first}."
        ) from first
    return rewards, f"it raised for {failures} of {len(completions)} samples, {type(first).__name__}: {first}"


class _WrongRewardError(ValueError):
    pass


def _numbers(value: Any, n: int, reward: RewardFn) -> Tensor:
    try:
        numbers = torch.as_tensor(value).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _WrongRewardError(
            f"the reward function {_name(reward)} must return one number per completion: {error}."
        ) from error
    if numbers.shape != (n,):
        raise _WrongRewardError(
            f"the reward function {_name(reward)} must return {n} numbers for {n} completions, got a value of shape"
            f" {tuple(numbers.shape)}."
        )
    return numbers


def _name(reward: RewardFn) -> str:
    return getattr(reward, "__qualname__", type(reward).__qualname__)
