"""Run by test_allocation_ddp.py: allocate and train on two processes, resume, and write what was seen."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grad import CausalLMSamplingModule, DynamicSampleAllocation, JSONLPrompts
from lightning_grad.sampling import AcceptanceRate
from tests.rollout_models import EasyPolicy, prompts
from tests.tiny_lm import make_checkpoint, write_prompts

EPOCHS = 3


class Watch(pl.Callback):
    """Of every iteration: the plan, the samples of this process, the mean gradient of its steps."""

    def __init__(self, allocation):
        self.allocation, self.plans, self.drawn, self.grads = allocation, [], [], []
        self.direct = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            plan = self.allocation.plan
            items = trainer.train_dataloader.items
            self.plans.append(plan.tolist())
            self.drawn.append(torch.bincount(items["prompt_index"], minlength=len(plan)).tolist())
            self.grads.append([])
            if isinstance(pl_module, EasyPolicy):
                weight = 1.0 / (len(plan) * plan[items["prompt_index"]].double())  # of the reward objectives, unscaled
                loss = -(weight * items["advantage"] * pl_module.logprob(items).double()).sum()
                params = list(pl_module.parameters())
                grads = torch.autograd.grad(loss, params)
                self.direct.append(torch.cat([g.flatten() for g in grads]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.grads:  # not in the rest of a resumed epoch
            self.grads[-1].append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())


def run(folder, kwargs, lr, ckpt=None, lm=None):
    torch.manual_seed(0)
    if lm is None:
        model, data = EasyPolicy(lr=lr), prompts(11)
    else:
        model = CausalLMSamplingModule(lm[0], reward="tests.tiny_lm.first_digit", max_new_tokens=4, lr=lr)
        data = JSONLPrompts(lm[1])
    allocation = DynamicSampleAllocation(samples_per_prompt=7, steps_per_iteration=3, **kwargs)
    watch = Watch(allocation)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=EPOCHS, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[allocation, watch, saver],
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return weights, watch, allocation


def gather(value):
    everyone = [None, None]
    dist.all_gather_object(everyone, value)
    return everyone


def gradient_error(watch):
    """Mean gradient of an epoch's steps against the sum over both processes' samples; steps change no weight here."""
    worst = 0.0
    for grads, own in zip(watch.grads, watch.direct, strict=True):
        total = own.clone()
        dist.all_reduce(total)
        gap = (torch.stack(grads).mean(0) - total).abs().max() / total.abs().max()
        worst = max(worst, float(gap))
    return worst


def metric_of_both():
    metric = AcceptanceRate(num_prompts=3)
    if dist.get_rank() == 0:
        metric.update(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]))
    else:
        metric.update(torch.tensor([True]), torch.tensor([0]))
    return float(metric.compute())


def main() -> None:
    out = Path(sys.argv[1])
    cases = {
        "em": {"save_rollouts": True},
        "history": {"pilot_mode": "history", "prompts_per_iteration": 5, "save_rollouts": True},
        "baseline": {"objective": "reward_baseline", "pilot_mode": "discard", "save_rollouts": True},
    }
    result = {}
    for name, kwargs in cases.items():
        straight, watch, allocation = run(out / name, kwargs, 1e-3)
        resumed = {}
        for step in (1, 3, 8) if name == "em" else (3,):
            again, _, later = run(out / f"{name}-again", kwargs, 1e-3, out / name / f"step={step}.ckpt")
            resumed[step] = bool(torch.equal(again, straight)) and later.plan.tolist() == watch.plans[-1]
        result[name] = {
            "plans": gather(watch.plans), "drawn": gather(watch.drawn), "resumed": gather(resumed),
            "generated": allocation.generated, "same": gather(straight.sum().item()),
        }  # fmt: skip
    _, watch, _ = run(out / "frozen", {"objective": "reward_baseline"}, 1e-30)
    result["gradient_error"] = gradient_error(watch)
    rank = dist.get_rank()
    make_checkpoint(out / "checkpoint")  # transformers writes on the first process only
    lm = str(out / "checkpoint"), write_prompts(out / f"p{rank}.jsonl")
    dist.barrier()
    weights, watch, _ = run(out / "lm", {}, 1e-3, lm=lm)
    result["lm"] = {"plans": gather(watch.plans), "drawn": gather(watch.drawn), "same": gather(weights.sum().item())}
    result["metric"] = gather(metric_of_both())
    if rank == 0:
        (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
