"""A tabular policy whose gradients, acceptance rates and variances are known by enumeration."""

import torch


class TabularPolicy:
    """``pi(y | x_i) = softmax(phi_iy . theta + o_iy)`` over ``k`` rationales of ``m`` prompts."""

    def __init__(self, m=12, k=10, d=6, seed=0):
        gen = torch.Generator().manual_seed(seed)
        self.phi = torch.randn(m, k, d, generator=gen, dtype=torch.float64)
        theta = torch.randn(d, generator=gen, dtype=torch.float64)
        target = torch.linspace(0.05, 0.95, m, dtype=torch.float64)
        self.right = torch.zeros(m, k, dtype=torch.bool)
        self.right[:, : k // 2] = True
        base = torch.softmax(self.phi @ theta, 1)
        mass = (base * self.right).sum(1)
        # an offset on the right answers makes the acceptance rate exactly the target
        offset = torch.log(target / (1 - target) * (1 - mass) / mass)
        self.pi = torch.softmax(self.phi @ theta + offset[:, None] * self.right, 1)
        self.score = self.phi - (self.pi[..., None] * self.phi).sum(1, keepdim=True)
        self.p = (self.pi * self.right).sum(1)
        accepted = self.pi * self.right / self.p[:, None]
        rejected = self.pi * ~self.right / (1 - self.p)[:, None]
        norm2 = self.score.square().sum(2)
        self.norm2, self.norm2_rejected = (accepted * norm2).sum(1), (rejected * norm2).sum(1)
        self.mean = (accepted[..., None] * self.score).sum(1)
        self.mean2 = self.mean.square().sum(1)
        self.m, self.d = m, d

    def draw(self, n, repetitions, seed=0):
        """Rationales of ``n[i]`` samples per prompt, ``[repetitions, sum(n)]``, and the prompt of each column."""
        gen = torch.Generator().manual_seed(seed)
        index = torch.repeat_interleave(torch.arange(self.m), n)
        edges = self.pi.cumsum(1)[index]
        u = torch.rand(repetitions, index.numel(), generator=gen, dtype=torch.float64)
        answer = (u[..., None] > edges).sum(2).clamp_max(self.pi.shape[1] - 1)
        return index, answer
