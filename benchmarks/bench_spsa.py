"""SPSA's three costs: passes over the parameters, a step with its memory, and bytes on the wire.

    python benchmarks/bench_spsa.py [--case passes|step|memory|wire] [--rounds 5]

Parameters: a transformer encoder of MiniLM's size (22.6 M). Beside each figure stands the way MeZO's code does the
    same:
`torch.manual_seed`, `torch.normal` and an addition out of place for every parameter and pass. `wire` needs Linux
and `unshare`; it counts all bytes of an empty network namespace's loopback, TCP/IP headers included.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._harness import Bench, copy_bandwidth
from lightning_grad.spsa.engine import SPSAEngine
from lightning_grad.spsa.options import Options
from lightning_grad.spsa.session import Session

EPS = 2.0**-10
BATCH = 32


class Encoder(nn.Module):
    """Six layers of width 384 with a vocabulary of 30522: 22.6 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, 384), nn.Embedding(512, 384)
        layer = nn.TransformerEncoderLayer(384, 12, 1536, dropout=0.1, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, 6)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.layers(hidden).mean(1))


class MeZO:
    """The reference's three passes and its update, written out from its description."""

    def __init__(self, module: nn.Module) -> None:
        self.params = [p for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def move(self, seed: int, factor: float) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            z = torch.normal(mean=0.0, std=1.0, size=p.shape)
            p.data = p.data + factor * z * EPS

    @torch.no_grad()
    def update(self, seed: int, lr_g: float) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            z = torch.normal(mean=0.0, std=1.0, size=p.shape)
            p.data = p.data - lr_g * (z + 0.0 * p.data)

    def step(self, forward: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            self.move(1, 1)
            plus = forward()
            self.move(1, -2)
            minus = forward()
            self.move(1, 1)
            self.update(1, 1e-6 * float(plus - minus) / (2 * EPS))


def passes(rounds: int) -> None:
    """A perturbation pass and updates of 1, 8, 16 and 64 directions, against `add_` and the usual loop."""
    bandwidth = copy_bandwidth()
    module = Encoder()
    engine = SPSAEngine(module.named_parameters(), seed=1, eps_log2=-10)
    count = engine.layout.numel
    mezo = MeZO(Encoder())
    other = [torch.randn_like(p) for p in mezo.params]
    turn = 0

    def add() -> None:
        with torch.no_grad():
            for p, q in zip(mezo.params, other, strict=True):
                p.add_(q, alpha=1e-9)

    def perturb() -> None:
        nonlocal turn
        turn = 1 - turn
        engine.perturb([(0, 0, 1 if turn else -1)])

    def update(m: int) -> Callable[[], object]:
        terms = [(1, d, 1e-6 * (d + 1)) for d in range(m)]
        return lambda: engine.apply(terms)

    variants: dict[str, Callable[[], object]] = {
        "tensor.add_": add,
        "perturb": perturb,
        "perturb, MeZO": lambda: mezo.move(1, 1e-6),
        **{f"update, {m} directions": update(m) for m in (1, 8, 16, 64)},
        "update, 16 directions, naive loop": lambda: [mezo.update(d, 1e-9) for d in range(16)],
    }
    bench = Bench("spsa", f"passes over {count / 1e6:.1f} M parameters", "tensor.add_")
    moved = {name: (12.0 if name == "tensor.add_" else 8.0) * count for name in variants if "naive" not in name}
    ratio = bench.run(variants, moved, bandwidth, rounds, warmup=1)
    bench.report()
    print(f"perturb reaches {1 / ratio['perturb']:.0%} of add_'s speed (bar: 30 %)")
    gain = ratio["update, 16 directions, naive loop"] / ratio["update, 16 directions"]
    print(f"16-direction update: {gain:.1f} times the naive loop (bar: 10)")


def step(rounds: int, length: int) -> None:
    """A step of one direction against two forward passes and three `add_`, and against MeZO's way."""
    module = Encoder().eval()
    tokens, labels = torch.randint(0, 30522, (BATCH, length)), torch.randint(0, 6, (BATCH,))

    def forward_of(net: nn.Module) -> Callable[[], Tensor]:
        return lambda: nn.functional.cross_entropy(net(tokens), labels)

    twin = Encoder().eval()
    other = [torch.randn_like(p) for p in twin.parameters()]

    def floor() -> None:
        with torch.no_grad():
            forward_of(twin)()
            forward_of(twin)()
            for _ in range(3):
                for p, q in zip(twin.parameters(), other, strict=True):
                    p.add_(q, alpha=1e-9)

    session = Session(Options(check_interval=0), module, 1)

    def ours() -> None:
        session.measure(0, forward_of(module))
        session.commit(session.record(session.payload(), 1e-7, (0,)))

    mezo = MeZO(Encoder().eval())
    net = mezo_net(mezo)
    bench = Bench("spsa", f"one step, 22.6 M parameters, batch {BATCH} x {length}", "two forwards and three add_")
    variants: dict[str, Callable[[], object]] = {
        "two forwards and three add_": floor,
        "SPSA step": ours,
        "MeZO's step": lambda: mezo.step(forward_of(net)),
    }
    ratio = bench.run(variants, rounds=rounds, warmup=1)
    bench.report()
    print(f"SPSA step: {ratio['SPSA step']:.3f} times two forwards and three add_ (bar: 1.15)")


def mezo_net(mezo: MeZO) -> nn.Module:
    net = Encoder().eval()
    mezo.params = list(net.parameters())
    return net


def peak_of(kind: str) -> None:
    """In a process of its own: peak resident memory over the model's own, in MiB."""
    torch.set_num_threads(1)
    module = Encoder().eval()
    tokens, labels = torch.randint(0, 30522, (BATCH, 16)), torch.randint(0, 6, (BATCH,))

    def forward() -> Tensor:
        return nn.functional.cross_entropy(module(tokens), labels)

    def run() -> None:
        if kind == "inference":
            with torch.no_grad():
                forward()
        elif kind == "SPSA":
            session.measure(0, forward)
            session.commit(session.record(session.payload(), 1e-7, (0,)))
        elif kind == "MeZO":
            mezo.step(forward)
        else:
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

    def status(key: str) -> float:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) / 1024

    with torch.no_grad():
        nn.functional.cross_entropy(module(tokens[:1]), labels[:1])  # libraries load their own buffers
    before = status("VmRSS")
    session = Session(Options(check_interval=0), module, 1) if kind == "SPSA" else None
    mezo = MeZO(module)
    kinds = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
    optimizer = kinds[kind](module.parameters(), lr=1e-7) if kind in kinds else None
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        run()
    print(f"{status('VmHWM') - before:.1f}")


def memory() -> None:
    """Peak memory of a step over the idle process with the model."""
    print(f"\npeak memory of a step over the idle process, 22.6 M parameters, batch {BATCH} x 16")
    peaks = {}
    for kind in ("inference", "SPSA", "MeZO", "SGD", "AdamW"):
        done = subprocess.run([sys.executable, __file__, "--peak-of", kind], capture_output=True, text=True, check=True)
        peaks[kind] = float(done.stdout.split()[-1])
        print(f"{kind:12s} {peaks[kind]:8.1f} MiB")
    chunks = 2 * 65536 * 4 / 2**20
    print(f"SPSA over inference: {peaks['SPSA'] - peaks['inference']:.1f} MiB (bar: {16 + chunks:.1f})")


def _loopback() -> int:
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])  # transmitted


def _member(rank: int, size: int, payload: int, steps: int, port: int) -> None:
    from torch import distributed as dist

    from lightning_grad.spsa.exchange import Exchange

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    link = Exchange()
    for _ in range(20):
        link.all_gather(bytes(payload))
    dist.barrier()
    before = _loopback()
    for _ in range(steps):
        link.all_gather(bytes(payload))
    dist.barrier()
    if rank == 0:
        per_step = (_loopback() - before) / steps / size
        print(f"{size} workers, {payload:3d} bytes each: {per_step:7.0f} bytes per worker and step on the interface;"
              f" payload {link.sent} sent, {link.received} received")  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def _serve(port: int) -> None:
    from lightning_grad.spsa.store import Store

    server = Store(f"127.0.0.1:{port}", "bench", serve=True)
    time.sleep(600)
    del server


def _elastic_member(rank: int, size: int, slots: int, steps: int, pause_s: float, port: int) -> None:
    from lightning_grad.spsa.auth import Authenticator
    from lightning_grad.spsa.elastic import ElasticOptions, ElasticWorker, Schedule
    from lightning_grad.spsa.store import Store

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Linear(8, 1)
    x = torch.randn(4, 8)
    session = Session(Options(check_interval=0, directions=slots), net, slots, "bench")
    store = Store(f"127.0.0.1:{port}", "bench")
    options = ElasticOptions(min_workers=size)
    worker = ElasticWorker(store, session, Schedule(1e-3, steps), options, Authenticator("bench", b"k" * 16))
    worker.join()
    before = 0
    while worker.prepare():
        if worker.step == steps // 5:
            before = _loopback()
        time.sleep(pause_s * (1 + worker.worker / 4))  # workers are never equally fast: the others poll
        session.measure(worker.worker, lambda: net(x).square().mean())
        worker.finish()
    if rank == 0:
        per_step = (_loopback() - before) / (steps - steps // 5) / size
        title = f"elastic, {size} workers, {slots:3d} bytes each, about {pause_s * 1000:3.0f} ms a step"
        print(f"{title}: {per_step:7.0f} bytes per worker and step on the interface", flush=True)


def elastic_wire(sizes: tuple[int, ...] = (2, 4), slots: tuple[int, ...] = (1, 16)) -> None:
    """The same for the elastic store: authenticated messages; the server's own journal keeping not counted."""
    fork = multiprocessing.get_context("fork")
    for number, (size, k, pause_s) in enumerate((n, k, p) for n in sizes for k in slots for p in (0.02, 0.2)):
        port = 29700 + number
        server = fork.Process(target=_serve, args=(port,), daemon=True)
        server.start()
        members = [
            fork.Process(target=_elastic_member, args=(r, size, k, 60, pause_s, port), daemon=True) for r in range(size)
        ]
        for member in members:
            member.start()
        for member in members:
            member.join()
        server.kill()
        server.join()


def wire(payloads: tuple[int, ...] = (1, 16, 256)) -> None:
    """Bytes on a loopback that nobody else uses."""
    if os.environ.get("SPSA_BENCH_NAMESPACE") != "1":
        environment = {**os.environ, "SPSA_BENCH_NAMESPACE": "1"}
        subprocess.run(["unshare", "-r", "-n", sys.executable, __file__, "--case", "wire"], env=environment, check=True)
        return
    with socket.socket() as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS: up
    print("\nbytes on the wire, gloo all_gather")
    fork = multiprocessing.get_context("fork")
    for number, (size, payload) in enumerate((n, k) for n in (2, 4) for k in payloads):
        members = [fork.Process(target=_member, args=(r, size, payload, 300, 29600 + number)) for r in range(size)]
        for member in members:
            member.start()
        for member in members:
            member.join()
    if len(payloads) > 1:
        print("\nbytes on the wire, elastic store")
        elastic_wire()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("passes", "step", "memory", "wire", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.peak_of:
        peak_of(args.peak_of)
        return
    cases = {
        "passes": lambda: passes(args.rounds),
        "step": lambda: [step(args.rounds, length) for length in (16, 64)],
        "memory": memory,
        "wire": wire,
    }
    for name, case in cases.items():
        if args.case in (name, "all"):
            case()


if __name__ == "__main__":
    main()
