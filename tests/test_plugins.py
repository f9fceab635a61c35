"""Foreign packages: one entry point adds an entry, and the family's contract suite runs on it by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
SUITES = [Path(__file__).parent / name for name in ("test_families.py", "test_rule_contract.py")]

PLUGIN = '''
"""A fusion, a scheme and a rule that keep their contracts, one of each that does not, and an imputer."""

import numpy as np
from torch import Tensor

from gapweave.server.aggregators import AGGREGATORS, Columnwise
from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.parts import Docks, Head, Numbers
from gapweave.shared.imputers import IMPUTERS, Imputer
from gapweave.shared.schemes import SCHEMES, Lesson, Scheme


@FUSIONS.register("foreign_honest")
class Honest(Fusion):
    """A sum.

    Reference: none
    Form: a sum
    Couples: nothing
    """

    reads_slots = False

    def __init__(self, shape: Shape, settings=None) -> None:
        super().__init__(shape)
        self.docks = Docks(shape.modalities, shape.embedding, 5)
        self.head = Head(5, shape.outputs, 7)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        return Fused(logits=self.head(self.pooled(slots, used)), weights=None)

    def pooled(self, slots: Tensor, used: Tensor) -> Tensor:
        return self.docks(slots, used).sum(1)


@FUSIONS.register("foreign_mixing")
class Mixing(Honest):
    """A sum, less its mean over the batch.

    Reference: none
    Form: a sum
    Couples: patients
    """

    def pooled(self, slots: Tensor, used: Tensor) -> Tensor:
        pooled = super().pooled(slots, used)
        return pooled - pooled.mean(0)


@IMPUTERS.register("foreign_constant")
class Constant(Imputer):
    """The null token, everywhere.

    Reference: none
    Form: a constant
    Couples: nothing
    """

    def forward(self, embeddings: Tensor, used: Tensor) -> Tensor:
        return self.tokens(len(used))


@SCHEMES.register("foreign_doubling")
class Doubling(Scheme):
    """Twice the loss.

    Reference: none
    Form: a factor
    Couples: nothing
    """

    def total(self, lesson: Lesson) -> Tensor:
        return 2 * lesson.plain


@SCHEMES.register("foreign_coupling")
class Coupling(Scheme):
    """The loss over its mean over the batch.

    Reference: none
    Form: a factor
    Couples: patients
    """

    def total(self, lesson: Lesson) -> Tensor:
        return lesson.plain / lesson.plain.mean()


class Middle(Columnwise):
    """The median of each coordinate."""

    properties = frozenset({"equal", "permutation", "translation", "breakdown"})

    def combine(self, block, f):
        return np.median(block, axis=0).astype(np.float32)


class Boastful(Middle):
    """The mean, which says that bad sites do not move it."""

    def combine(self, block, f):
        return block.mean(0)


AGGREGATORS.register("foreign_middle")(Middle())
AGGREGATORS.register("foreign_boastful")(Boastful())
'''


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Outcome -> tests of the suite about the plug-in's entries, as they ended with it installed."""
    site = tmp_path_factory.mktemp("installed")
    (site / "their_fusions.py").write_text(PLUGIN, encoding="utf-8")
    info = site / "their_fusions-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-fusions\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[gapweave.plugins]\ntheirs = their_fusions\n", encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rA", "-p", "no:cacheprovider", "-k", "foreign"]
    done = subprocess.run(
        [*command, *map(str, SUITES)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "ERROR": set()}
    for outcome, test in re.findall(r"^(PASSED|FAILED|ERROR) \S*?::(\S+)", done.stdout, re.MULTILINE):
        found[outcome].add(test)
    assert found["PASSED"], done.stdout + done.stderr
    return found


def test_the_suite_runs_on_a_fusion_and_an_imputer_that_are_installed(outcomes: dict[str, set[str]]) -> None:
    mine = {test for test in outcomes["PASSED"] if "foreign_honest" in test}
    assert len(mine) >= 12
    assert {test.partition("[")[0] for test in mine} >= {
        "test_a_fusion_decides_one_record_at_a_time_in_every_pattern",
        "test_a_fusion_never_reads_what_an_absent_modality_says",
        "test_two_hospitals_train_one_private_round",
        "test_parameters_survive_a_file_and_a_message",
    }
    assert any("foreign_constant" in test for test in outcomes["PASSED"])
    assert not outcomes["ERROR"]
    assert any("test_a_scheme_trains_one_private_round[foreign_doubling]" in test for test in outcomes["PASSED"])
    mixing = ("foreign_mixing", "foreign_coupling", "foreign_boastful")
    assert not [test for test in outcomes["FAILED"] if not any(name in test for name in mixing)]


def test_the_suite_finds_a_fusion_that_mixes_patients(outcomes: dict[str, set[str]]) -> None:
    failed = {test.partition("[")[0] for test in outcomes["FAILED"] if "foreign_mixing" in test}
    assert failed >= {
        "test_a_fusion_decides_one_record_at_a_time_in_every_pattern",
        "test_a_fusion_has_per_patient_gradients",
        "test_two_hospitals_train_one_private_round",
    }


def test_the_suite_finds_a_scheme_that_couples_patients(outcomes: dict[str, set[str]]) -> None:
    failed = {test.partition("[")[0] for test in outcomes["FAILED"] if "foreign_coupling" in test}
    assert failed >= {
        "test_a_schemes_loss_is_of_one_record_in_every_pattern",
        "test_a_scheme_trains_one_private_round",
    }


def test_the_suite_finds_a_rule_that_promises_too_much(outcomes: dict[str, set[str]]) -> None:
    of = {kind: {test for test in tests if test.startswith("test_a_rule")} for kind, tests in outcomes.items()}
    assert {test.partition("[")[0] for test in of["FAILED"]} == {"test_a_rule_stays_with_the_honest_sites"}
    assert all("foreign_boastful" in test for test in of["FAILED"])
    assert {test.partition("[")[0] for test in of["PASSED"] if "foreign_middle" in test} >= {
        "test_a_rule_stays_with_the_honest_sites",
        "test_a_rule_moves_with_the_updates",
        "test_a_rule_with_fewer_sites_than_its_theorem_needs_says_so",
    }
