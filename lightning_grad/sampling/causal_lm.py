"""Causal language models of ``transformers`` that learn from their own rewarded samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.allocation.e_step import seed_for
from lightning_grad.data.rollouts import RolloutBatch, clipped_policy_loss, weighted_policy_loss
from lightning_grad.sampling import generation
from lightning_grad.sampling.metrics import AcceptanceRate
from lightning_grad.sampling.prompt_file import Prompt
from lightning_grad.sampling.rewards import RewardFn, resolve_reward, score

DType = Literal["auto", "float32", "bfloat16", "float16"]


class CausalLMSamplingModule(pl.LightningModule):
    r"""A causal language model, its tokenizer and a reward, for :class:`lightning_grad.DynamicSampleAllocation`.

    Prompts are :class:`lightning_grad.sampling.Prompt` objects, as :class:`lightning_grad.JSONLPrompts` reads them, or
    plain texts. The policy is the softmax of the logits over ``temperature``, in sampling and in training; settings a
    checkpoint recommends for generation (penalties, cut tails) are not used, they would be another policy. The loss is
    :math:`\sum_j v_j c_j (-\log \pi(y_j))` with the weights and coefficients of the callback's objective. A model that
    is loaded by name is in evaluation mode and stays there: no dropout, in training neither.

    Logs ``train/loss`` and ``train/completion_length``; with validation prompts ``val/accuracy``, the acceptance rate
    of samples for them, drawn with the same numbers each time.

    Args:
        model: Folder or hub name of a checkpoint, or a model.
        tokenizer: The same; ``None``: that of ``model``, which a model made from a config alone does not have.
        reward: Import path of a function or class, or a function, ``(prompts, completions, references) -> rewards``.
            A sample whose reward is NaN, or for which the function raises, counts as not drawn.
        max_new_tokens: Longest completion in tokens, >= 1.
        temperature: Of the policy, > 0.
        generation_batch_size: Completions that are generated at a time, >= 1.
        lr: Learning rate of AdamW; the command line's ``optimizer:`` replaces it.
        clip_ratio: Clip the ratio to the sampling policy at 1 plus or minus this, in (0, 1); needed for
            ``every_n_epochs > 1``. ``None``: the plain loss.
        chat_template: Present a text as a user's message, by the tokenizer's chat template.
        dtype: Of the weights that are loaded.
        val_samples: Samples of each validation prompt, >= 1.
        accept_threshold: A validation sample is accepted if its reward is above.
        progress: Show a bar while generating.

    Raises:
        ModuleNotFoundError: ``transformers`` is not installed.
        TypeError: ``model`` is neither text nor a module.
        ValueError: An argument is out of range, no tokenizer is found, or it lacks an end token.
    """

    def __init__(
        self,
        model: Any,  # not `str | nn.Module`: shell completion would list every module there is, for minutes
        tokenizer: Any = None,
        reward: str | RewardFn = "lightning_grad.sampling.MathAnswerReward",
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        generation_batch_size: int = 64,
        lr: float = 1e-6,
        clip_ratio: float | None = None,
        chat_template: bool = False,
        dtype: DType = "float32",
        val_samples: int = 1,
        accept_threshold: float = 0.5,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, str | nn.Module):
            raise TypeError(f"`model` must be a name, a path or a module, got {model!r}.")
        self.max_new_tokens = check_int("max_new_tokens", max_new_tokens, 1)
        self.temperature = check_range("temperature", temperature, 0.0, float("inf"), "()")
        self.generation_batch_size = check_int("generation_batch_size", generation_batch_size, 1)
        self.lr = check_range("lr", lr, 0.0, 1e10, "(]")
        self.clip_ratio = None if clip_ratio is None else check_range("clip_ratio", clip_ratio, 0.0, 1.0, "()")
        self.val_samples = check_int("val_samples", val_samples, 1)
        self.accept_threshold = accept_threshold
        self.val_accuracy = AcceptanceRate()
        self.chat_template, self.progress = chat_template, progress
        check_choice("dtype", dtype, get_args(DType))
        self.reward = resolve_reward(reward)
        objects = {"model": model, "tokenizer": tokenizer, "reward": reward}
        self.save_hyperparameters(ignore=[k for k, v in objects.items() if not isinstance(v, str | None)])
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "name_or_path", "")
        self.model: Any = _load("AutoModelForCausalLM", model, dtype=dtype) if isinstance(model, str) else model
        self.tokenizer: Any = _tokenizer(name if tokenizer is None else tokenizer)
        self.eos_ids = self._end_tokens()
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.eos_ids[0] if pad is None else pad

    def _end_tokens(self) -> list[int]:
        recommended = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        found = recommended if isinstance(recommended, list) else [recommended]
        found = [i for i in [*found, self.tokenizer.eos_token_id] if i is not None]
        if not found:
            raise ValueError(
                "`tokenizer` must have an end token (`eos_token`), or completions never end; set it before use."
            )
        return list(dict.fromkeys(found))

    @property
    def vocab_size(self) -> int:
        """Outputs of the head; the size of a chunk of samples to score follows from it."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def head_bias(self) -> bool:
        """Whether the output head has a bias, which is part of the score norm."""
        return getattr(self.model.get_output_embeddings(), "bias", None) is not None

    def _attached(self) -> pl.Trainer | None:
        try:
            return self.trainer
        except RuntimeError:  # used without a Trainer
            return None

    def _autocast(self) -> AbstractContextManager[Any]:
        # outside of training_step Lightning does not enter it for us
        trainer = self._attached()
        return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()

    def sample(self, prompts: list[Any], counts: Tensor, generator: torch.Generator) -> RolloutBatch:
        """Draw ``counts[i]`` completions of every prompt, rows grouped by prompt, and reward them."""
        asked = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
        encoded = [self._encode(p, i) if int(counts[i]) else [] for i, p in enumerate(asked)]
        index = torch.repeat_interleave(torch.arange(len(prompts)), counts)
        # rows of one batch should need little padding
        order = torch.argsort(torch.tensor([len(encoded[i]) for i in index.tolist()]), stable=True)
        own = torch.Generator(self.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        parts = []
        for rows in self._bar(order.split(self.generation_batch_size)):
            ids, mask = generation.left_padded([encoded[i] for i in index[rows].tolist()], self.pad_id)
            with self._autocast():
                part = generation.generate(
                    self.model,
                    ids.to(self.device),
                    mask.to(self.device),
                    max_new_tokens=self.max_new_tokens,
                    eos_ids=self.eos_ids,
                    pad_id=self.pad_id,
                    temperature=self.temperature,
                    generator=own,
                )
            parts.append([tensor.cpu() for tensor in part])
        width = max(tokens.shape[1] for tokens, _ in parts)
        back = torch.argsort(order)
        tokens = torch.cat([generation.pad_right(tokens, width, self.pad_id) for tokens, _ in parts])[back]
        logprob = torch.cat([generation.pad_right(logp, width) for _, logp in parts])[back]
        ids, mask = generation.left_padded([encoded[i] for i in index.tolist()], self.pad_id)
        end = generation.end_mask(tokens, self.eos_ids)
        reward = self._rewards([asked[i] for i in index.tolist()], tokens, end)
        return RolloutBatch(index, ids, tokens, end, reward, logprob, mask)

    def _encode(self, prompt: Prompt, place: int) -> list[int]:
        text = prompt.text
        if self.chat_template or not isinstance(text, str):
            messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has put them in
        else:
            ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError(f"prompt {place} has no tokens: {text!r}.")
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and len(ids) + self.max_new_tokens > longest:
            raise ValueError(
                f"prompt {place} has {len(ids)} tokens; with max_new_tokens={self.max_new_tokens} that is more than the"
                f" {longest} positions of the model. Shorten it or lower max_new_tokens."
            )
        return list(ids)

    def _bar(self, chunks: tuple[Tensor, ...]) -> Iterator[Tensor]:
        from tqdm import tqdm  # type: ignore[import-untyped]

        trainer = self._attached()
        shown = self.progress and trainer is not None and trainer.is_global_zero
        shown = shown and getattr(trainer, "progress_bar_callback", None) is not None
        with tqdm(total=sum(map(len, chunks)), desc="Generating", leave=False, disable=not shown) as bar:
            for rows in chunks:
                yield rows
                bar.update(len(rows))

    def _rewards(self, prompts: list[Prompt], tokens: Tensor, mask: Tensor) -> Tensor:
        texts = [p.text if isinstance(p.text, str) else p.text[-1].get("content", "") for p in prompts]
        completions = self.decode(tokens, mask)
        rewards, problem = score(self.reward, texts, completions, [p.answer for p in prompts])
        if problem:
            rank_zero_warn(f"CausalLMSamplingModule: the reward function failed; {problem}. They count as not drawn.")
        return rewards

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Texts of completions ``[n, R]``, without end tokens."""
        rows = [row[kept.bool()].tolist() for row, kept in zip(tokens, mask, strict=True)]
        ends = set(self.eos_ids)
        return [self.tokenizer.decode([i for i in row if i not in ends], skip_special_tokens=True) for row in rows]

    def hidden_and_logits(self, rollouts: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of the output head where it predicts the completion."""
        batch = {name: value.to(self.device) for name, value in rollouts.state_dict().items()}
        with self._autocast():
            hidden, logits = self._forward(batch)
        return hidden.float() / self.temperature, logits

    def _forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, logits = generation.completion_logits(
            self.model,
            batch["prompt_ids"],
            batch.get("prompt_mask"),
            batch["completion_ids"],
            batch["completion_mask"],
        )
        return hidden, logits.float() / self.temperature

    def logprob(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probability of each token of the completions, 0 after the end, ``[n, R]``."""
        token = torch.log_softmax(self._forward(batch)[1], -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
        return token * batch["completion_mask"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted policy loss."""
        batch = _trimmed(batch)
        logprob = self.logprob(batch)
        if self.clip_ratio is None:
            loss = weighted_policy_loss(logprob.sum(1), batch)
        else:
            loss = clipped_policy_loss(logprob, batch, self.clip_ratio)
        n = len(logprob)
        self.log("train/loss", loss, prog_bar=True, batch_size=n)
        self.log("train/completion_length", batch["completion_mask"].sum(1).float().mean(), batch_size=n)
        return loss

    def validation_step(self, batch: dict[str, list[Any]], batch_idx: int) -> None:
        """Sample for held-out prompts; one that cannot be judged is left out."""
        prompts = [Prompt(text, answer) for text, answer in zip(batch["text"], batch["answer"], strict=True)]
        generator = torch.Generator().manual_seed(seed_for(batch_idx, self.global_rank))
        reward = self.sample(prompts, torch.full((len(prompts),), self.val_samples), generator).reward
        accepted = reward[torch.isfinite(reward)] > self.accept_threshold
        self.val_accuracy.update(accepted.to(self.device))
        self.log("val/accuracy", self.val_accuracy, prog_bar=True, on_epoch=True, batch_size=len(prompts))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without weight decay."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)


def _trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns that are padding in all rows: they were as wide as the longest of the iteration."""
    length = max(1, int(batch["completion_mask"].sum(1).max()))
    names = [name for name in ("completion_ids", "completion_mask", "logprob") if name in batch]
    batch = batch | {name: batch[name][:, :length] for name in names}
    if "prompt_mask" in batch:
        width = max(1, int(batch["prompt_mask"].sum(1).max()))
        batch |= {name: batch[name][:, -width:] for name in ("prompt_ids", "prompt_mask")}
    return batch


def _tokenizer(source: Any) -> Any:
    if not isinstance(source, str):
        return source
    remedy = "give `tokenizer`, the tokenizer itself or the folder or hub name it is loaded from."
    if not source:
        raise ValueError(f"`model` is a module that does not say where it comes from: {remedy}")
    try:
        return _load("AutoTokenizer", source)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {source!r} ({error}); {remedy}") from error


def _load(kind: str, source: str, **kwargs: Any) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'CausalLMSamplingModule needs transformers: pip install "lightning-grad[hf]".'
        ) from error
    return getattr(transformers, kind).from_pretrained(source, **kwargs)
