"""A randomly initialised language model with its tokenizer, written to a folder; and rewards by import path."""

from __future__ import annotations

import json

import pytest

WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789", "+", "=", "is", "sum", "user", "?"]
LLAMA = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def make_checkpoint(folder, kind="llama", pad=True, **changes):
    pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}?"
    common = {"vocab_size": len(WORDS), "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**common, **(LLAMA | changes)))
        else:
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
            model = GPT2LMHeadModel(GPT2Config(**common, **(sizes | changes)))
    # as real checkpoints do, and as a policy must not be
    model.generation_config.update(top_k=2, repetition_penalty=3.0, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_prompts(path, num=6):
    rows = [
        {"prompt": " + ".join("1" * (1 + i % 3)) + " =", "answer": i % 3 + 1, "difficulty": i % 3} for i in range(num)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def first_digit(prompts, completions, references):
    """1 if the first word is a digit below 2 + 3 * reference: harder for small references."""
    return [float(c[:1].isdigit() and int(c[0]) < 2 + 3 * int(r)) for c, r in zip(completions, references, strict=True)]


def some_nan(prompts, completions, references):
    return [float("nan") if i % 5 == 3 else float(i % 2) for i, _ in enumerate(completions)]


def fails_on_empty(prompts, completions, references):
    return [float(ord(c[0]) % 2) for c in completions]


def always_fails(prompts, completions, references):
    raise KeyError("judge")


def nothing(prompts, completions, references):
    return [0.0] * len(completions)
