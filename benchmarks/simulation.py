"""Cost of a simulated round over a plain loop: `make bench-simulation`, one JSON line a cell.

256 patients a site, about 200,000 parameters, 10 rounds of 5 steps of batch 64, privacy off. The floor is `floor.py`;
engines run interleaved with it, each in a process of its own, and the best of some runs counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PATIENTS, COLUMNS, ROUNDS, STEPS = 256, 10, 10, 5
HERE = Path(__file__).parent


def write_federation(folder: Path, sites: int) -> None:
    """Study, site files and tables of so many sites, and the same as arrays for the floor."""
    import numpy as np
    import yaml

    from gapweave.shared.config import load_study
    from gapweave.shared.model import MultimodalModel

    card = {"low": -5, "high": 5, "center": 0, "scale": 1}
    columns = {f"x{at}": card for at in range(COLUMNS)}
    study = {
        "version": 1,
        "name": "bench",
        "task": {"kind": "binary", "label": "y"},
        "modalities": {name: {"kind": "table", "columns": columns} for name in "ab"},
        "model": {"embedding": 512},
        "sharing": {"policy": "all"},
        "training": {"rounds": ROUNDS, "local_steps": STEPS, "batch": 64, "lr": 0.05},
        "aggregation": {"default": "mean"},
        "privacy": {"enabled": False},
        "evaluation": {"test_fraction": 0.0, "epsilon": None},
    }
    (folder / "sites").mkdir(parents=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    arrays = {}
    for at in range(sites):
        generator, name = np.random.default_rng(at), f"site{at:03d}"
        values = generator.normal(size=(PATIENTS, 2 * COLUMNS)).round(3)
        label = (values[:, 0] + values[:, COLUMNS] + generator.normal(size=PATIENTS) > 0).astype(int)
        names = [f"{part}{column}" for part in "ab" for column in range(COLUMNS)]
        table = {
            "id": [f"r{row:03d}" for row in range(PATIENTS)],
            "y": label,
            **dict(zip(names, values.T, strict=True)),
        }
        _write_site(folder, name, table)
        seen = np.ones((PATIENTS, COLUMNS))
        for start, part in ((0, "a"), (COLUMNS, "b")):
            pairs = np.stack([values[:, start : start + COLUMNS], seen], 2).reshape(PATIENTS, -1)
            arrays[f"{at}/{part}"] = pairs.astype(np.float32)
        arrays[f"{at}/y"] = label[:, None].astype(np.float32)
    np.savez(folder / "data.npz", **arrays)
    model = MultimodalModel(load_study(folder / "study.yaml"), ["a", "b"])
    np.savez(folder / "start.npz", **{name: value.detach().numpy() for name, value in model.named_parameters()})


def _write_site(folder: Path, name: str, table: dict[str, Any]) -> None:
    import polars as pl
    import yaml

    pl.DataFrame(table).write_csv(folder / f"{name}.csv")
    sources = {
        part: {"file": f"../{name}.csv", "columns": {f"x{at}": f"{part}{at}" for at in range(COLUMNS)}} for part in "ab"
    }
    records = {"file": f"../{name}.csv", "id": "id", "patient": "id", "label": {"y": "y"}}
    site = {"version": 1, "name": name, "data": {"records": records, **sources}, "patients": {"declared": PATIENTS}}
    (folder / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")


def run_ours(folder: Path, out: Path, engine: str) -> dict[str, Any]:
    """One simulation, in this process.

    Returns:
        s_round, start_s (to the first round, without importing torch), wall_s, and mb (after the last round, as of the
        floor: what the report draws comes later).
    """
    begun = time.perf_counter()
    import torch  # noqa: F401 - its import is not ours to shorten

    imported = time.perf_counter() - begun
    from gapweave.sites.simulate import commands

    places = commands.Places(sites=None, data=None, out=out, state=None)
    first: list[float] = []
    memory: list[float] = []

    class Watch(commands.Bars):
        """Notes when the handshake is over, and the memory after the last round."""

        def prepared(self, sites: int, rounds: int, done: int) -> None:
            first.append(time.perf_counter())

        def round_done(self, number: int, auroc: float | None) -> None:
            if number == ROUNDS:
                memory.append(anonymous_mb())

    commands.Bars = Watch  # type: ignore[misc]
    summary, _ = commands.start(folder / "study.yaml", {}, places, baselines=(), continue_without=False, engine=engine)
    return {
        "s_round": summary["wall_s"] / ROUNDS,
        "start_s": first[0] - begun - imported,
        "wall_s": time.perf_counter() - begun,
        "mb": memory[0],
    }


def anonymous_mb() -> float:
    """Anonymous memory of this process."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    return int(text.split("Anonymous:")[1].split()[0]) / 1024


def difference(folder: Path, out: Path) -> float:
    """The largest difference of a parameter from the floor's."""
    import numpy as np

    from gapweave.shared import tensorfile
    from gapweave.shared.model import group_of

    ours, _ = tensorfile.parse((out / "model" / "shared.safetensors").read_bytes())
    with np.load(folder / "floor.npz") as floor:
        pairs = [(floor[name], group_of(name)) for name in floor]
    return max(float(abs(value - ours[group][key]).max()) for value, (group, key) in pairs)


def _json(*command: str) -> dict[str, Any]:
    start = time.perf_counter()
    text = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(text.splitlines()[-1])
    return {"wall_s": time.perf_counter() - start, **result}


def bench(sites: int, engines: list[str], repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Lines of one number of sites: the floor, then the engines."""
    write_federation(folder, sites)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ["floor", *engines]}
    differences = {"floor": 0.0}
    for at in range(repeats):
        runs["floor"].append(_json(str(HERE / "floor.py"), str(folder), str(sites), str(ROUNDS), str(STEPS)))
        for engine in engines:
            out = folder / f"run-{engine}-{at}"
            runs[engine].append(_json(__file__, "--one", engine, "--folder", str(folder), "--out", str(out)))
            differences[engine] = difference(folder, out)
    floor = min(run["s_round"] for run in runs["floor"])
    lines = []
    for name, found in runs.items():
        best = {key: min(run[key] for run in found) for key in found[0]}
        lines.append({
            "sites": sites, "engine": name, "s_round": round(best["s_round"], 4),
            "x_floor": round(best["s_round"] / floor, 3), "wall_s": round(best["wall_s"], 2),
            "start_s": round(best["start_s"], 2), "mb": round(best["mb"], 1), "mb_per_site": None,
            "max_diff": differences[name],
        })  # fmt: skip
    return lines


def main() -> None:
    """Print a line a cell; `mb_per_site` is over the cell with fewer sites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", default="4,10,50,200")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ray", default="10", help="numbers of sites at which Ray runs too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_ours(options.folder, options.out, options.one)))
        return
    before: dict[str, tuple[int, float]] = {}
    with_ray = {int(text) for text in options.ray.split(",") if text}
    for sites in map(int, options.sites.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            engines = ["inline", *(["ray"] if sites in with_ray else [])]
            for line in bench(sites, engines, options.repeats, Path(scratch) / "federation"):
                if line["engine"] in before:
                    fewer, mb = before[line["engine"]]
                    line["mb_per_site"] = round((line["mb"] - mb) / (sites - fewer), 3)
                before[line["engine"]] = (sites, line["mb"])
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
