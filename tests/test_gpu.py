"""What only a GPU can show; skipped by name where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from batches import flat, four_kinds, random_batch, random_model
from commandline import run

from gapweave.client.gradients.fast import FastEngine
from gapweave.sites.demo import write_demo

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


def test_clipped_sums_on_the_gpu_are_those_of_the_cpu() -> None:
    """The same, but for rounding; and no shortcut in precision is on."""
    of = four_kinds()
    batch, bound = random_batch(of, (1,) * 24), 0.5
    used = batch.present.clone()
    expected = flat(FastEngine(random_model(of), "binary", bound).sum(batch, used))
    device = torch.device("cuda")
    found = flat(FastEngine(random_model(of).to(device), "binary", bound).sum(batch.to(device), used.to(device)))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_two_sites_on_one_gpu_by_their_site_files(tmp_path: Path) -> None:
    """The model is that of the CPU, but for rounding; the sites' file says which device."""
    study = write_demo(tmp_path / "demo", hospitals=2, patients=100)
    words = ("--rounds", "2", "--set", "privacy.enabled=false")
    aurocs = {}
    for device in ("cpu", "cuda:0"):
        for file in (study.parent / "sites").glob("*.yaml"):
            content = {**yaml.safe_load(file.read_text()), "device": device}
            file.write_text(yaml.safe_dump(content))
        before = torch.cuda.max_memory_allocated()
        out = tmp_path / device.replace(":", "")
        assert run("simulate", str(study), "--out", str(out), *words).code == 0
        assert (torch.cuda.max_memory_allocated() > before) == (device != "cpu")
        aurocs[device] = json.loads((out / "summary.json").read_text())["mean"]["auroc"]
    assert aurocs["cuda:0"] == pytest.approx(aurocs["cpu"], abs=0.01)
