"""Bad input, typed at the command line: one line, the right exit code, nothing written, no patient value told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from commandline import LABEL, OPEN, QUICK, _call, done, edit, gapweave, hospitals, records, site_file

SECRET = "zq77x"
"""Part of every planted value: no message may hold it."""

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospitals(tmp_path_factory.mktemp("hospitals") / "demo", patients=40)


@pytest.fixture
def study(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original.parent, tmp_path / "demo")
    return tmp_path / "demo" / original.name


def in_study(**changes: object) -> Change:
    return lambda study: edit(study, **changes)


def in_site(**changes: object) -> Change:
    return lambda study: edit(site_file(study, "alder"), **changes)


def in_records(*columns: pl.Expr) -> Change:
    return lambda study: records(study, "alder", lambda frame: frame.with_columns(*columns))


def column(name: str, value: object) -> pl.Expr:
    """A column with a value in the first five rows, and what was there below."""
    first = pl.int_range(pl.len()) < 5
    return pl.when(first).then(pl.lit(value)).otherwise(pl.col(name).cast(pl.String)).alias(name)


def folds(study: Path) -> None:
    """One patient with two records, in training and in test."""
    edit(site_file(study, "alder"), split={"by": None, "column": "fold"})
    name = f"{SECRET}-1"
    fold = pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit("train")).otherwise(pl.lit("test"))
    records(study, "alder", lambda frame: frame.with_columns(fold.alias("fold"), column("patient_id", name)))


def header_only(study: Path) -> None:
    records(study, "alder", lambda frame: frame.head(0))


def no_modality(study: Path) -> None:
    edit(site_file(study, "alder"), data=dict.fromkeys(("labs", "note", "scan", "vitals")))


def broken_image(study: Path) -> None:
    sorted((study.parent / "data" / "alder" / "scans").iterdir())[3].write_bytes(SECRET.encode())


def latin(study: Path) -> None:
    (study.parent / "data" / "alder" / "notes.csv").write_bytes(f"record_id,text\n{SECRET},\xe9\n".encode("latin-1"))


def no_file(study: Path) -> None:
    (study.parent / "data" / "alder" / "labs.csv").unlink()


def no_column(study: Path) -> None:
    file = study.parent / "data" / "alder" / "labs.csv"
    pl.read_csv(file).drop("sodium").write_csv(file)


def repeated_record(study: Path) -> None:
    records(study, "alder", lambda frame: frame.with_columns(column("record_id", f"{SECRET}-1")))


def twins(study: Path) -> None:
    edit(site_file(study, "birch"), name="alder")


def no_sites(study: Path) -> None:
    shutil.rmtree(study.parent / "sites")


def not_yaml(study: Path) -> None:
    study.write_text("version: 1\n  name: [", encoding="utf-8")


def key_twice(study: Path) -> None:
    study.write_text(study.read_text(encoding="utf-8") + "\nseed: 1\nseed: 2\n", encoding="utf-8")


BAD: dict[str, tuple[Change, int, tuple[str, ...]]] = {
    "unknown key in the study": (in_study(trainig={"rounds": 2}), 2, ("'trainig'", "did you mean 'training'")),
    "unknown key deep in it": (in_study(training={"round": 2}), 2, ("training", "did you mean 'rounds'")),
    "wrong type in the study": (in_study(training={"lr": "quick"}), 2, ("training.lr", "found 'quick'")),
    "a list for a mapping": (in_study(training=[1]), 2, ("training",)),
    "another version": (in_study(version=2), 2, ("version 1",)),
    "no name": (in_study(name=None), 2, ("name: this key is required",)),
    "a study that is no YAML": (not_yaml, 2, ("not valid YAML", "study.yaml:")),
    "a key given twice": (key_twice, 2, ("'seed' is given twice",)),
    "unknown key in a site file": (in_site(polisy={"epsilon": 1}), 2, ("'polisy'", "did you mean 'policy'")),
    "unknown key deep in one": (in_site(policy={"epsilom": 1}), 2, ("policy", "did you mean 'epsilon'")),
    "wrong type in a site file": (in_site(patients={"upper": "many"}), 2, ("patients.upper", "found 'many'")),
    "epsilon 0": (in_study(privacy={"epsilon": 0}), 2, ("privacy.epsilon", "greater than 0")),
    "epsilon below 0": (in_study(privacy={"epsilon": -1}), 2, ("privacy.epsilon", "greater than 0")),
    "infinite epsilon": (in_study(privacy={"epsilon": float("inf")}), 2, ("privacy.epsilon", "finite")),
    "a cap of 0": (in_site(policy={"epsilon": 0}), 2, ("policy.epsilon", "greater than 0")),
    "delta 1": (in_study(privacy={"delta": 1}), 2, ("privacy.delta", "less than 1")),
    "delta 1 at a site": (in_site(policy={"delta": 1.0}), 2, ("policy.delta", "less than 1")),
    "clipping at 0": (in_study(privacy={"max_grad_norm": 0}), 2, ("privacy.max_grad_norm",)),
    "classes of a binary task": (in_study(task={"classes": ["0", "1"]}), 2, ("task", "multiclass")),
    "range upside down": (
        in_study(modalities={"labs": {"columns": {"sodium": {"low": 500}}}}), 2, ("sodium", "low=500"),
    ),
    "no modality in the study": (
        in_study(modalities=dict.fromkeys(("labs", "note", "scan", "vitals"))), 2, ("modalities", "at least 1"),
    ),
    "a modality of a name that site files have": (
        in_study(modalities={"records": {"kind": "text"}}), 2, ("modalities", "no modality can be called 'records'"),
    ),
    "unknown fusion": (in_study(model={"fusion": "lat"}), 2, ("model.fusion", "did you mean 'late'")),
    "unknown imputer": (in_study(model={"imputer": "magic"}), 2, ("model.imputer", "Installed:")),
    "unknown scheme": (in_study(scheme={"name": "magic"}), 2, ("scheme.name", "Installed:")),
    "unknown setting of a scheme": (
        in_study(scheme={"name": "tla", "settings": {"strenght": 1}}), 2, ("scheme.settings", "'strength'"),
    ),
    "unknown setting of an imputer": (
        in_study(model={"imputer_settings": {"stage": 1}}), 2, ("model.imputer_settings", "did you mean 'stages'"),
    ),
    "a tensor too large": (
        in_study(model={"fusion": "tensor", "fusion_settings": {"width": 8}}), 2, ("9^4 = 6,561", "low_rank_tensor"),
    ),
    "unknown rule": (in_study(aggregation={"default": "avrage"}), 2, ("aggregation.default", "Installed:")),
    "unknown rule of a group": (
        in_study(aggregation={"encoder/*": "avrage"}), 2, ("aggregation.encoder/*", "Installed:"),
    ),
    "unknown encoder": (
        in_study(modalities={"labs": {"encoder": "magic"}}), 2, ("modalities.labs.encoder", "Installed:"),
    ),
    "a device that is not there": (in_site(device="cuda:93"), 2, ("there is no cuda:93", "alder.yaml:device")),
    "two sites of one name": (twins, 2, ("two sites are called 'alder'", "birch.yaml")),
    "no site files": (no_sites, 2, ("no site files", "gapweave site init")),
    "label not mapped": (in_study(task={"label": "death"}), 2, ("'death'", "alder.yaml")),
    "missing data file": (no_file, 6, ("labs.csv",)),
    "missing column": (no_column, 6, ("labs.csv:sodium",)),
    "missing label column": (in_site(data={"records": {"label": {LABEL: "outcome"}}}), 6, ("records.csv:outcome",)),
    "strange label": (in_records(column(LABEL, SECRET)), 6, ("5 rows hold a label that is not one of 0, 1",)),
    "one class": (in_records(pl.lit(1).alias(LABEL)), 6, ("one-class site",)),
    "empty site": (header_only, 6, ("has no rows",)),
    "no label at all": (in_records(pl.lit(None).alias(LABEL)), 6, ("no training record has a label",)),
    "no modality of the study": (no_modality, 6, ("none of the study's modalities", "alder.yaml")),
    "patient in training and test": (folds, 6, ("same patient in train and test",)),
    "record id twice": (repeated_record, 6, ("4 rows repeat the record id",)),
    "unreadable image": (broken_image, 6, ("images are truncated or no PNG",)),
    "text that is not UTF-8": (latin, 6, ("notes.csv", "not UTF-8")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(study: Path, tmp_path: Path, name: str) -> None:
    change, code, texts = BAD[name]
    change(study)
    outcome = gapweave("simulate", study, "--out", tmp_path / "run", *QUICK, *OPEN)
    assert outcome.code == code, outcome.err
    for text in texts:
        assert text in outcome.error
    assert SECRET not in outcome.err
    assert not (tmp_path / "run").exists()
    assert not (study.parent / "state").exists()


OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown baseline": (("--baselines", "local,magic"), ("'magic'", "local, pooled, lr, gbm")),
    "unknown engine": (("--engine", "magic"), ("'magic'", "Known: inline, ray")),
    "unknown option": (("--ruonds", "3"), ("--ruonds", "--rounds")),
    "no number": (("--rounds", "many"), ("--rounds", "not a valid integer")),
    "no rounds": (("--rounds", "0"), ("training.rounds", "greater than or equal to 1")),
    "seed below 0": (("--seed", "-1"), ("seed", "greater than or equal to 0")),
    "unknown path": (("--set", "training.roundz=3"), ("did you mean 'rounds'",)),
    "path through a value": (("--set", "name.x=3"), ("'name.x' is no path",)),
    "two numbers of rounds": (
        ("--rounds", "3", "--set", "training.rounds=4"),
        ("training.rounds is given twice: 3 and 4", "--rounds, --set"),
    ),
    "no assignment": (("--set", "epsilon"), ("'epsilon' is not key=value",)),
    "unknown method": (("--set", "method=magic"), ("no method is called 'magic'", "concat")),
    "misspelt method": (("--set", "method=omnifus"), ("Did you mean 'omnifuse'?",)),
    "misspelt engine": (("--engine", "rya"), ("Did you mean 'ray'?",)),
    "misspelt baseline": (("--baselines", "locl"), ("Did you mean 'local'?",)),
    "unknown sharing": (("--set", "sharing=some"), ("sharing",)),
    "a value of the wrong type": (("--set", "epsilon=many"), ("privacy.epsilon", "found 'many'")),
    "a broken value": (("--set", "epsilon=[1"), ("cannot be read",)),
    "more missing than there is": (("--set", "missing_rate=1.2"), ("simulation.missing_rate", "less than 1", "1.2")),
    "unknown fusion": (("--set", "fusion=atention"), ("model.fusion", "did you mean 'attention'")),
    "no folder of sites": (("--sites", "/nowhere/at/all"), ("no site files",)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(original: Path, tmp_path: Path, name: str) -> None:
    words, texts = OPTIONS[name]
    outcome = gapweave("simulate", original, "--out", tmp_path / "run", *words)
    assert outcome.code == 2, outcome.err
    for text in texts:
        assert text in outcome.error
    assert not (tmp_path / "run").exists()


def test_an_engine_that_is_not_installed(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = gapweave("simulate", original, "--out", tmp_path / "run", "--engine", "ray")
    assert outcome.code == 2
    assert "Ray is not installed" in outcome.error
    assert "gapweave[simulation]" in outcome.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["simulate", "study check"])
def test_no_study_file(tmp_path: Path, command: str) -> None:
    outcome = gapweave(*command.split(), tmp_path / "nothing.yaml")
    assert outcome.code == 2
    assert "there is no study file" in outcome.error


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_output_is_kept(original: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "run"
    content = out if kind == "file" else out / "mine.txt"
    content.parent.mkdir(exist_ok=True)
    content.write_text("mine", encoding="utf-8")
    outcome = gapweave("simulate", original, "--out", out, *QUICK)
    assert outcome.code == 2
    assert ("this is a file" if kind == "file" else "exists") in outcome.error
    assert content.read_text(encoding="utf-8") == "mine"


def test_an_output_that_cannot_be_made_is_told_before_data_are_read(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    outcome = gapweave("simulate", original, "--out", tmp_path / "file" / "run", *QUICK)
    assert outcome.code == 2
    assert "no folder can be made here" in outcome.error
    assert "warning" not in outcome.error


@pytest.mark.parametrize(
    ("assignments", "code", "said"),
    [
        (["model.fusion=lat"], 2, "model.fusion: no fusion is called 'lat'"),
        (["aggregation.quorum=9"], 4, "aggregation.quorum: "),
        (["attack=zero", "simulation.bad_sites=9"], 2, "simulation.bad_sites: 9 bad sites of"),
    ],
)
def test_an_error_of_a_study_names_its_file(
    original: Path, tmp_path: Path, assignments: list[str], code: int, said: str
) -> None:
    options = [word for assignment in assignments for word in ("--set", assignment)]
    outcome = gapweave("simulate", original, "--out", tmp_path / "run", *QUICK, *options)
    assert outcome.code == code
    assert f"error: {original}:{said}" in outcome.error


@pytest.mark.parametrize("words", [["simulat"], ["study", "chek", "x"], ["--loud"], ["predict"], ["study", "check"]])
def test_unknown_or_incomplete_commands(words: list[str]) -> None:
    outcome = gapweave(*words)
    assert outcome.code == 2
    assert "--help" in outcome.error


def test_problems_at_several_sites_are_counted(study: Path, tmp_path: Path) -> None:
    for name in ("alder", "cedar"):
        records(study, name, lambda frame: frame.with_columns(pl.lit(1).alias(LABEL)))
    outcome = gapweave("simulate", study, "--out", tmp_path / "run", *QUICK)
    assert outcome.code == 6
    assert "problems at 1 more site" in outcome.error


def test_a_traceback_only_with_debug(original: Path, tmp_path: Path) -> None:
    """And the same code: it was 1, as if the error were ours."""
    plain, debug = (_call(("simulate", tmp_path / "nothing.yaml"), debug=wanted) for wanted in (False, True))
    assert plain.code == debug.code == 2
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err


def test_absurd_values_are_counted_and_survived(study: Path, tmp_path: Path) -> None:
    file = study.parent / "data" / "alder" / "labs.csv"
    odd = pl.Series("sodium", ["inf", "-inf", "NaN", "1e300", "-1e9", "high"])
    frame = pl.read_csv(file)
    values = pl.concat([odd, frame["sodium"].cast(pl.String)[len(odd) :]])
    frame.with_columns(values.alias("sodium")).write_csv(file)
    checked = done("site", "check", site_file(study, "alder"), "--study", study)
    lines = [line for line in checked.out.splitlines() if "sodium" in line and line.startswith("warning")]
    assert lines
    assert all(any(digit.isdigit() for digit in line) for line in lines)
    assert "1e300" not in checked.out
    assert "1e+300" not in checked.out
    done("simulate", study, "--out", tmp_path / "run", *QUICK, *OPEN)
