"""Prompts and answers from a file with one JSON object per line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_grad._validate import check_int
from lightning_grad.sampling.data_module import RolloutDataModule


@dataclass(frozen=True)
class Prompt:
    """A question and what the reward function compares with.

    Args:
        text: The prompt, or a list of chat messages ``{"role": ..., "content": ...}``.
        answer: The reference.
    """

    text: str | list[dict[str, str]]
    answer: Any = None


class JSONLPrompts(RolloutDataModule):
    """Prompts of a JSONL file, e.g. ``{"prompt": "1 + 1 =", "answer": "2", "difficulty": 1}`` on each line.

    ``difficulty``, an integer that is on all lines or on none, is for logging acceptance by level.

    Args:
        path: The file, UTF-8. Empty lines are skipped.
        prompt_key: Where the prompt is: a text, or a list of chat messages.
        answer_key: Where the answer is: a text or a number.
        difficulty_key: Where the difficulty is.
        limit: Read the first so many prompts only, >= 1.
        val_path: A file of held-out prompts; the model is validated on samples for them.
        val_batch_size: Held-out prompts of a validation batch, >= 1.

    Raises:
        ValueError: A line is not as it should be; the message has its number.
    """

    def __init__(
        self,
        path: str,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        difficulty_key: str = "difficulty",
        limit: int | None = None,
        val_path: str | None = None,
        val_batch_size: int = 64,
    ) -> None:
        if limit is not None:
            check_int("limit", limit, 1)
        self.val_batch_size = check_int("val_batch_size", val_batch_size, 1)
        keys = (prompt_key, answer_key, difficulty_key)
        self.val_prompts = [] if val_path is None else read_prompts(val_path, *keys)[0]
        prompts, levels = read_prompts(path, *keys, limit)
        super().__init__(prompts, levels)

    def val_dataloader(self) -> Any:
        """Held-out prompts; nothing without ``val_path``."""
        if not self.val_prompts:
            return []
        return DataLoader(self.val_prompts, batch_size=self.val_batch_size, collate_fn=_as_lists)  # type: ignore[arg-type]


def _as_lists(prompts: list[Prompt]) -> dict[str, list[Any]]:
    return {"text": [p.text for p in prompts], "answer": [p.answer for p in prompts]}


def read_prompts(
    path: str | Path,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    difficulty_key: str = "difficulty",
    limit: int | None = None,
) -> tuple[list[Prompt], list[int] | None]:
    """Prompts and difficulties of a JSONL file; see :class:`JSONLPrompts`."""
    prompts: list[Prompt] = []
    levels: list[int] = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"`path` must be a readable JSONL file, got {str(path)!r}: {error.strerror}.") from error
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        if limit is not None and len(prompts) == limit:
            break
        where = f"{path}:{number}"
        row = _row(raw, where)
        prompts.append(Prompt(_prompt(row, prompt_key, where), _answer(row, answer_key, where)))
        if difficulty_key in row:
            level = row[difficulty_key]
            if not isinstance(level, int) or isinstance(level, bool):
                raise ValueError(f"{where}: {difficulty_key!r} must be an integer, got {level!r}.")
            levels.append(level)
        if len(levels) not in (0, len(prompts)):
            have = "has" if difficulty_key in row else "lacks"
            raise ValueError(f"{where}: {difficulty_key!r} must be on all lines or on none; this one {have} it.")
    if not prompts:
        raise ValueError(f"{path} holds no prompts: every line is empty.")
    return prompts, levels or None


def _row(raw: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason}, byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg}, column {error.colno}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(row).__name__}.")
    return row


def _value(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise ValueError(f"{where}: has no {key!r}; it has {', '.join(map(repr, row)) or 'nothing'}.")
    return row[key]


def _prompt(row: dict[str, Any], key: str, where: str) -> str | list[dict[str, str]]:
    prompt = _value(row, key, where)
    messages = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not messages and not (isinstance(prompt, str) and prompt.strip()):
        raise ValueError(f"{where}: {key!r} must be a text or a list of chat messages, got {prompt!r}.")
    return prompt  # type: ignore[no-any-return]


def _answer(row: dict[str, Any], key: str, where: str) -> str | int | float:
    answer = _value(row, key, where)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise ValueError(f"{where}: {key!r} must be a text or a number, got {answer!r}.")
    return answer
