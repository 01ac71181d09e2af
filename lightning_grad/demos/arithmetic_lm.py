"""ArithmeticChain in words, for a language model of transformers: a checkpoint, files of prompts, and a reward.

The checkpoint is a GPT-2 of 60 k parameters with random weights and a tokenizer of 27 words. It is loaded like any
other, by the path of its folder, and learns to imitate imperfect solutions before its own samples are rewarded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_grad._validate import check_int
from lightning_grad.demos import arithmetic as chain
from lightning_grad.sampling.causal_lm import CausalLMSamplingModule
from lightning_grad.sampling.generation import completion_logits
from lightning_grad.sampling.prompt_file import JSONLPrompts

# in the order of the token numbers of `arithmetic`; the second font is that of full-width digits
WORDS = [*"0123456789", *"０１２３４５６７８９", "=", "steps:", "direct:", "<s>", "</s>", "_", "stop"]
REWARD = "lightning_grad.demos.arithmetic_lm.last_digit_reward"


def last_digit_reward(prompts: Sequence[str], completions: Sequence[str], references: Sequence[Any]) -> Tensor:
    """1 where the last word is the digit of the reference, in either font, else 0."""
    words = [text.split()[-1:] for text in completions]
    right = [w[0].isdigit() and int(w[0]) == int(r) if w else False for w, r in zip(words, references, strict=True)]
    return torch.tensor(right).float()


def write_checkpoint(folder: Path, seed: int = 0) -> None:
    """A randomly initialised model and its tokenizer, as ``from_pretrained`` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="_"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="_", unk_token="_"
    )
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=48, n_layer=2, n_head=4, n_positions=32, activation_function="relu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=chain.BOS, eos_token_id=chain.EOS, pad_token_id=chain.PAD,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        for embedding in (model.transformer.wte, model.transformer.wpe):
            nn.init.normal_(embedding.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, num: int, seed: int) -> None:
    """Sums of one to eight digits, modulo 10, one JSON object per line."""
    prompts, answers, k = chain.make_problems(num, torch.Generator().manual_seed(seed))
    lines = []
    for tokens, answer, level in zip(prompts, answers.tolist(), k.tolist(), strict=True):
        text = " ".join(WORDS[i] for i in tokens.tolist())  # of equal length, so that steps and digits are aligned
        lines.append(json.dumps({"prompt": text, "answer": answer, "difficulty": level}))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, path)  # whole at any time: each process of a run writes it and reads it


class ArithmeticJSONL(JSONLPrompts):
    """Writes the prompts of ArithmeticChain to ``folder`` and reads them like anybody's.

    Args:
        folder: For ``train.jsonl`` and ``val.jsonl``.
        num_prompts: Prompts to train on, >= 1.
        num_val: Held-out prompts, >= 1.
        seed: Of the problems.
    """

    def __init__(self, folder: str, num_prompts: int = 128, num_val: int = 256, seed: int = 0) -> None:
        check_int("num_prompts", num_prompts, 1)
        check_int("num_val", num_val, 1)
        train, val = Path(folder, "train.jsonl"), Path(folder, "val.jsonl")
        write_prompts(train, num_prompts, check_int("seed", seed, 0))
        write_prompts(val, num_val, seed + 1)
        super().__init__(str(train), val_path=str(val), val_batch_size=num_val)


class ArithmeticLM(CausalLMSamplingModule):
    """A tiny GPT-2 checkpoint that learns imperfect demonstrations before the run.

    Args:
        folder: Of the checkpoint; a randomly initialised one is written if there is none.
        lr: Learning rate of AdamW.
        base_steps: Steps of imitation before the run, 0 for none. A run with ``max_steps`` makes at most ten times as
            many, so that a trial run is short.
        val_samples: Samples of each validation prompt.
    """

    def __init__(self, folder: str, lr: float = 1e-3, base_steps: int = 800, val_samples: int = 4) -> None:
        if not Path(folder, "config.json").exists():
            write_checkpoint(Path(folder))
        super().__init__(
            folder, reward=REWARD, max_new_tokens=chain.RESPONSE_LENGTH, generation_batch_size=1024, lr=lr,
            val_samples=val_samples,
        )  # fmt: skip
        self.base_steps = check_int("base_steps", base_steps, 0)
        self.save_hyperparameters("folder", "lr", "base_steps", "val_samples")

    def setup(self, stage: str) -> None:
        """Imitate the demonstrations."""
        steps = self.base_steps if self.trainer.max_steps < 0 else min(self.base_steps, 10 * self.trainer.max_steps)
        if stage == "fit" and steps:
            rank_zero_info(f"ArithmeticLM: imitating demonstrations for {steps} steps (800 take a minute).")
            with torch.enable_grad():
                chain.train_base(_OnTokens(self.model), steps)


class _OnTokens(nn.Module):
    """The language model as ``train_base`` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def response_hidden_and_logits(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of the head where it predicts the response."""
        return completion_logits(self.model, prompts, None, responses, chain.response_mask(responses))
