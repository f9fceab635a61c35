"""What a private step costs over a plain one: `make bench-privacy`, one JSON line a cell.

Each engine works in a process of its own, as in training, with one thread; the processes take turns, so that a slow
minute of the machine meets them all. Times are medians of process time, as ratios to the plain step. `oom` stands
where an engine does not fit, `refused` where it does not take the model, also not with Opacus' own GRU and attention
in place of torch's.

Memory, by engine, is the peak of the resident set during the steps above what the same process held idle: library,
model, batch and engine loaded, one step done, free memory given back.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from engines import GhostEngine, VmapEngine, with_twins
from torch import Tensor, nn

from gapweave.client.gradients import GradientEngine, fast
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


ENGINES: dict[str, tuple[Callable[[MultimodalModel], GradientEngine], float]] = {
    "plain": (lambda model: PlainEngine(model, "binary"), 0.0),
    "fast": (lambda model: fast.FastEngine(model, "binary", 1.0), 0.0),
    "fast_with_noise": (lambda model: fast.FastEngine(model, "binary", 1.0), 1.0),
    "opacus": (lambda model: OpacusEngine(model, "binary", 1.0), 0.0),
    "ghost": (GhostEngine, 0.0),
    "vmap": (VmapEngine, 0.0),
}
"""Name -> (engine, noise multiplier)."""

TWINNED = ("opacus", "ghost")
"""Engines that refuse torch's GRU and attention, and get Opacus' own."""

SHARES = {
    "norms": [(fast, "_parts"), (fast.FastEngine, "_combine")],
    "noise": [(Step, "_noised")],
    "update": [(Sgd, "step")],
}
"""What the complete private step spends time on, beside forward and backward."""


def runner(of: Study, name: str) -> Callable[[Batch], None]:
    """One training step of an engine on its own model."""
    torch.manual_seed(0)
    model = MultimodalModel(of, of.order)
    if name in TWINNED:
        model = with_twins(model)
    build, noise = ENGINES[name]
    plan = Plan(
        noise_multiplier=noise,
        sample_rate=1.0,
        n_hat=100,
        steps=1,
        rounds=1,
        finetune_steps=0,
        max_grad_norm=1.0,
        epsilon=None,
        delta=1e-5,
    )
    step = Step(study=of, plan=plan, engine=build(model), draws=SecretDraws())
    optimizer = Sgd(of, {})
    return lambda batch: optimizer.step(model, step.gradient(batch))


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def settled() -> int:
    """Give free memory back, forget the peak; what is left."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


@contextmanager
def stopwatches(spent: dict[str, float]) -> Iterator[None]:
    """Add up the time that each of `SHARES` takes."""
    kept = [(share, owner, name, getattr(owner, name)) for share, places in SHARES.items() for owner, name in places]
    for share, owner, name, real in kept:

        def timed(*arguments: Any, share: str = share, real: Callable[..., Any] = real) -> Any:
            start = time.process_time()
            try:
                return real(*arguments)
            finally:
                spent[share] = spent.get(share, 0.0) + time.process_time() - start

        setattr(owner, name, timed)
    try:
        yield
    finally:
        for _, owner, name, real in kept:
            setattr(owner, name, real)


def work(pipe: Connection, model: str, size: int, name: str) -> None:
    """A child process: one engine, a step a message; each answer is the time spent, or why there is none."""
    of = study(model)
    batch = patients(of, size)
    try:
        step = runner(of, name)
        step(batch)
        idle = settled()
        while pipe.recv() == "step":
            spent: dict[str, float] = {}
            with stopwatches(spent):
                start = time.process_time()
                step(batch)
                spent["all"] = time.process_time() - start
            pipe.send(spent)
        pipe.send((resident("VmHWM") - idle) / 2**20)
    except (UsageError, RuntimeError, NotImplementedError, MemoryError) as error:
        full = isinstance(error, MemoryError) or "memory" in str(error)
        pipe.send("oom" if full else "refused")


class Child:
    """One engine's process.

    Args:
        model: of `study`.
        size: of the batch.
        name: of `ENGINES`.
    """

    def __init__(self, model: str, size: int, name: str) -> None:
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe()
        self.process = fork.Process(target=work, args=(theirs, model, size, name), daemon=True)
        self.process.start()
        theirs.close()
        self.failure: str | None = None
        self.steps: list[dict[str, float]] = []
        self.megabytes: float | None = None

    def step(self) -> None:
        """One step, unless the engine has failed."""
        if self.failure is None:
            answer = self._ask("step")
            if isinstance(answer, str):
                self.failure = answer
            else:
                self.steps.append(answer)

    def finish(self) -> None:
        """End the process."""
        if self.failure is None:
            self.megabytes = self._ask("end")
        self.process.join()

    def median(self, share: str = "all") -> float:
        """Seconds."""
        return statistics.median(step.get(share, 0.0) for step in self.steps)

    def _ask(self, what: str) -> Any:
        with suppress(OSError):  # it has said why and gone
            self.pipe.send(what)
        try:
            return self.pipe.recv()
        except (EOFError, OSError):  # the system ended a process that took too much
            return "oom"


def cell(model: str, size: int, repeats: int) -> dict[str, Any]:
    """One line."""
    children = {name: Child(model, size, name) for name in ENGINES}
    for _ in range(repeats):
        for child in children.values():
            child.step()
    for child in children.values():
        child.finish()
    plain, private = children["plain"].median(), children["fast_with_noise"]
    line: dict[str, Any] = {"model": model, "batch": size, "plain_ms": round(1000 * plain, 2)}
    for name, child in children.items():
        if name != "plain":
            line[name] = child.failure or round(child.median() / plain, 3)
    rest = private.median() - sum(private.median(share) for share in SHARES)
    line["forward_backward"] = round(rest / plain, 3)
    line |= {share: round(private.median(share) / plain, 3) for share in SHARES}
    return line | {f"mb_{name}": child.failure or round(child.megabytes or 0, 1) for name, child in children.items()}


def register() -> None:
    """The encoders of this benchmark."""
    ENCODERS.register("bench_gru")(GruEncoder)
    ENCODERS.register("bench_attention")(AttentionEncoder)


def main() -> None:
    """Print a line a cell."""
    cells = [(model, size) for model in ("gru", "attention") for size in (32, 128, 256)]
    cells += [("cnn", size) for size in (8, 16, 32)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one tiny cell: does it run?")
    parser.add_argument("--only", metavar="MODEL:BATCH", nargs="+", help="these cells")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each engine")
    chosen = parser.parse_args()
    if chosen.smoke:
        cells, chosen.repeats = [("cnn", 2)], 2
    if chosen.only:
        cells = [(model, int(size)) for model, _, size in (name.partition(":") for name in chosen.only)]
    torch.set_num_threads(1)
    register()
    for model, size in cells:
        print(json.dumps(cell(model, size, chosen.repeats)), flush=True)


if __name__ == "__main__":
    main()
