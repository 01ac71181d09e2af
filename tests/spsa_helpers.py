"""Small models, headers and runs that the SPSA tests share."""

import torch

from lightning_grad.spsa.options import Options
from lightning_grad.spsa.session import Session


def tiny_model(seed=5, inputs=4, hidden=5, outputs=2):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, outputs))


def batches(count, size=8, inputs=4, outputs=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, inputs, generator=generator)
    return list(zip(x, torch.randn(count, size, outputs, generator=generator), strict=True))


def loss_of(model, batch):
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def make_session(model=None, slots=1, run_id="0123456789abcdef", **options):
    options.setdefault("check_interval", 1)
    return Session(Options(**options), model if model is not None else tiny_model(), slots, run_id)


def run_alone(session, data, lr=2.0**-6, workers=(0,), codes_of=None):
    """Steps of a group of one: every step uses ``slots / directions`` batches. Returns the digests after each step."""
    digests = []
    window = session.header.directions // session.options.directions
    for step in range(len(data) // window):
        for batch in data[step * window : (step + 1) * window]:
            session.measure(workers[0], lambda b=batch: loss_of(session.module, b))
        session.commit(session.record(session.payload(), lr, workers), digests.append)
    return digests


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
