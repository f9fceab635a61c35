"""What a private step costs over a plain one: `make bench-privacy`, one JSON line a cell.

Ratios of medians, engines interleaved so that a slow minute of the machine meets them all; one thread. `oom` stands
where an engine does not fit, `refused` where it does not take the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gapweave.client.gradients import GradientEngine
from gapweave.client.gradients.fast import FastEngine
from gapweave.client.gradients.opacus import OpacusEngine
from gapweave.client.gradients.plain import PlainEngine
from gapweave.client.training import Sgd, Step
from gapweave.shared.config.base import parse
from gapweave.shared.config.study import Study
from gapweave.shared.encoders import ENCODERS
from gapweave.shared.errors import UsageError
from gapweave.shared.model import MultimodalModel
from gapweave.shared.privacy.draws import SecretDraws
from gapweave.shared.privacy.plan import Plan
from gapweave.shared.schema import Batch, Modality, modalities

WIDTH = 128


class GruEncoder(nn.Module):
    """The last state of a GRU."""

    def __init__(self, modality: Modality, embedding: int) -> None:
        super().__init__()
        self.body = nn.GRU(modality.shape[1], embedding, batch_first=True)

    def forward(self, values: Tensor) -> Tensor:
        """[B, T, 2V] -> [B, d]."""
        states, _ = self.body(values)
        return torch.tanh(states[:, -1])


class AttentionEncoder(nn.Module):
    """One transformer block."""

    def __init__(self, modality: Modality, embedding: int) -> None:
        super().__init__()
        self.into = nn.Linear(modality.shape[1], embedding)
        self.attend = nn.MultiheadAttention(embedding, 4, batch_first=True)
        self.norm = nn.LayerNorm(embedding)
        self.hidden = nn.Linear(embedding, 2 * embedding)
        self.out = nn.Linear(2 * embedding, embedding)

    def forward(self, values: Tensor) -> Tensor:
        """[B, T, 2V] -> [B, d]."""
        tokens = self.into(values)
        tokens = self.norm(tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0])
        return torch.tanh((tokens + self.out(torch.tanh(self.hidden(tokens)))).mean(1))


def study(model: str) -> Study:
    """Four modalities of the sizes of an ICU record; `cnn` has a 224 px image in place of text."""
    columns = {f"v{at:02d}": {"low": 0, "high": 1} for at in range(38)}
    kinds: dict[str, Any] = {
        "vitals": {"kind": "series", "hours": 24, "columns": columns, "encoder": f"bench_{model}"},
        "labs": {"kind": "table", "columns": columns},
        "note": {"kind": "text", "buckets": 512},
    }
    if model == "cnn":
        kinds["vitals"].pop("encoder")
        kinds["cxr"] = {"kind": "image", "size": 224}
    task = {"kind": "binary", "label": "y"}
    settings = {"embedding": WIDTH, "fusion": "concat", "imputer": "cra"}
    return parse(Study, {"version": 1, "name": "bench", "task": task, "modalities": kinds, "model": settings}, "bench")


def patients(of: Study, size: int) -> Batch:
    """Random records, a third of the modalities absent."""
    generator = torch.Generator().manual_seed(0)
    inputs = {part.name: torch.randn(size, *part.shape, generator=generator) for part in modalities(of)}
    present = torch.rand(size, len(of.order), generator=generator) < 0.7
    present[:, 0] = True
    return Batch(
        inputs=inputs,
        present=present,
        target=(torch.rand(size, 1, generator=generator) < 0.5).float(),
        label_mask=torch.ones(size, 1, dtype=torch.bool),
        patient=torch.arange(size),
        weight=torch.ones(size),
        patients=size,
    )


def runner(
    of: Study, batch: Batch, engine: Callable[[MultimodalModel], GradientEngine], noise: float
) -> Callable[[], None]:
    """One training step of an engine on its own model."""
    torch.manual_seed(0)
    model = MultimodalModel(of, of.order)
    plan = Plan(
        noise_multiplier=noise,
        sample_rate=1.0,
        n_hat=batch.patients,
        steps=1,
        rounds=1,
        finetune_steps=0,
        max_grad_norm=1.0,
        epsilon=None,
        delta=1e-5,
    )
    step = Step(study=of, plan=plan, engine=engine(model), draws=SecretDraws())
    optimizer = Sgd(of, {})
    return lambda: optimizer.step(model, step.gradient(batch))


ENGINES: dict[str, tuple[Callable[[MultimodalModel], GradientEngine], float]] = {
    "plain": (lambda model: PlainEngine(model, "binary"), 0.0),
    "fast": (lambda model: FastEngine(model, "binary", 1.0), 0.0),
    "fast_with_noise": (lambda model: FastEngine(model, "binary", 1.0), 1.0),
    "opacus": (lambda model: OpacusEngine(model, "binary", 1.0), 0.0),
}


def cell(model: str, size: int, repeats: int) -> dict[str, Any]:
    """One line: medians of interleaved steps."""
    of = study(model)
    batch = patients(of, size)
    steps: dict[str, Callable[[], None]] = {}
    times: dict[str, list[float]] = {}
    line: dict[str, Any] = {"model": model, "batch": size}
    for name, (engine, noise) in ENGINES.items():
        try:
            step = runner(of, batch, engine, noise)
            step()
        except UsageError:
            line[name] = "refused"
        except (MemoryError, RuntimeError):
            line[name] = "oom"
        else:
            steps[name], times[name] = step, []
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    line["plain_ms"] = round(1000 * medians["plain"], 2)
    line |= {name: round(value / medians["plain"], 3) for name, value in medians.items() if name != "plain"}
    line["mb_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return line


def main() -> None:
    """Print a line a cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="smallest batches, few repeats")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    ENCODERS.register("bench_gru")(GruEncoder)
    ENCODERS.register("bench_attention")(AttentionEncoder)
    cells = [("gru", size) for size in (32, 128, 256)] + [("attention", size) for size in (32, 128, 256)]
    cells += [("cnn", size) for size in (8, 16, 32)]
    if chosen.smoke:
        cells = [("gru", 32), ("attention", 32), ("cnn", 8)]
    for model, size in cells:
        print(json.dumps(cell(model, size, repeats=3 if chosen.smoke else 15)), flush=True)


if __name__ == "__main__":
    main()
