"""The floor of `make bench-simulation`: the same study as one plain loop, with numpy and torch and nothing else.

python benchmarks/floor.py DIR SITES ROUNDS STEPS reads DIR/data.npz and DIR/start.npz, writes DIR/floor.npz.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, linear

BEGUN = time.perf_counter()
torch.set_num_threads(1)
folder, sites, rounds, steps = Path(sys.argv[1]), *map(int, sys.argv[2:5])
batch, lr, drop_rate = 64, 0.05, 0.6
model = {name: torch.from_numpy(value) for name, value in np.load(folder / "start.npz").items()}
with np.load(folder / "data.npz") as stored:
    cohorts = [[torch.from_numpy(stored[f"{at}/{part}"]) for part in ("a", "b", "y")] for at in range(sites)]


def layer(weights, name, x):
    return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def loss_of(weights, inputs, target, used):
    embedded = []
    for name, x in zip("ab", inputs, strict=True):
        encoder = f"encoders.{name}"
        deep = layer(weights, f"{encoder}.deep", torch.tanh(layer(weights, f"{encoder}.hidden", x)))
        embedded.append(torch.tanh(layer(weights, f"{encoder}.wide", x) + deep))
    embedded, mask = torch.stack(embedded, 1), used.unsqueeze(-1)
    current = torch.where(mask, embedded, weights["imputer.null.weight"].expand_as(embedded)).flatten(1)
    for at in range(3):
        stage = f"imputer.stages.{at}"
        code = torch.tanh(layer(weights, f"{stage}.hidden", torch.cat([current, used.float()], -1)))
        current = current + layer(weights, f"{stage}.out", torch.tanh(layer(weights, f"{stage}.code", code)))
    votes = torch.stack([layer(weights, f"heads.{name}", embedded[:, at])[:, 0] for at, name in enumerate("ab")], 1)
    votes = torch.where(used, votes, 0.0)
    fused = votes.sum(1) / used.sum(1) + weights["fusion.intercept.weight"][0, 0]
    own = binary_cross_entropy_with_logits(votes, target.expand_as(votes), reduction="none")
    missed = (current.view_as(embedded) - embedded.detach()).square().mean(-1)
    total = binary_cross_entropy_with_logits(fused, target[:, 0], reduction="none")
    total = total + torch.where(used, own, 0.0).sum(1) / used.sum(1)
    return (total + torch.where(used, 0.0, missed).sum(1) / (~used).sum(1).clamp(min=1)).sum()


def local(at, number):
    key = f"0/site{at:03d}/{number}"
    draws = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")))
    weights = {name: value.clone().requires_grad_() for name, value in model.items()}
    a, b, y = cohorts[at]
    for _ in range(steps):
        chosen = torch.from_numpy(draws.random(len(y)) < batch / len(y)).nonzero()[:, 0]
        uniform = torch.from_numpy(draws.random((len(chosen), 3))).float()
        subset = (uniform[:, :2] < 0.5) | (uniform[:, :2] == uniform[:, :2].amin(1, keepdim=True))
        used = subset | (uniform[:, 2:] >= drop_rate)
        loss = loss_of(weights, (a[chosen], b[chosen]), y[chosen], used)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            torch._foreach_sub_(list(weights.values()), [gradient / batch for gradient in gradients], alpha=lr)
    return {name: (value.detach() - model[name]).numpy() for name, value in weights.items()}


started = time.perf_counter()
for number in range(1, rounds + 1):
    total = {name: np.zeros(value.shape) for name, value in model.items()}
    for at in range(sites):
        for name, value in local(at, number).items():
            total[name] += value
    model = {name: value + torch.from_numpy((total[name] / sites).astype(np.float32)) for name, value in model.items()}
seconds = time.perf_counter() - started
np.savez(folder / "floor.npz", **{name: value.numpy() for name, value in model.items()})
memory = Path("/proc/self/smaps_rollup").read_text().split("Anonymous:")[1].split()[0]
print(json.dumps({"s_round": seconds / rounds, "mb": int(memory) / 1024, "start_s": started - BEGUN}))
