"""Study and site files: what is refused and in which words, and what is the same study."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gapweave.shared.config import Site, Study, load_site, load_study
from gapweave.shared.config.base import parse, read_yaml
from gapweave.shared.config.connection import load_connection
from gapweave.shared.config.study import study_from_json
from gapweave.shared.errors import UsageError

STUDY: dict[str, Any] = {
    "version": 1,
    "name": "little",
    "task": {"kind": "binary", "label": "y"},
    "modalities": {
        "vitals": {"kind": "series", "hours": 24, "columns": {"pulse": {"low": 10, "high": 300}}},
        "labs": {
            "kind": "table",
            "columns": {"sodium": {"low": 100, "high": 180}, "sex": {"categories": [0, 1]}},
        },
        "cxr": {"kind": "image", "size": 32},
        "note": {"kind": "text", "buckets": 64},
    },
    "sharing": {"policy": {"encoder/*": "holders", "encoder/cxr": "local"}},
    "aggregation": {"quorum": 3, "encoder/*": "mean"},
}
SITE: dict[str, Any] = {
    "version": 1,
    "name": "north",
    "data": {
        "records": {"file": "r.csv", "id": "id", "patient": "p", "label": {"y": "died"}},
        "labs": {"file": "l.csv", "columns": {"sodium": "na", "sex": {"column": "s", "codes": {"m": 1, "f": 0}}}},
        "note": {"file": "n.csv", "columns": ["text"]},
        "cxr": {"folder": "images", "column": "file"},
    },
    "policy": {"epsilon": 3},
}

Change = Callable[[dict[str, Any]], None]


def put(path: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            content = content.setdefault(parent, {})
        content[last] = value

    return change


def drop(path: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            content = content[parent]
        del content[last]

    return change


def refusal(model: type[Study] | type[Site], change: Change) -> str:
    content = copy.deepcopy(STUDY if model is Study else SITE)
    parse(model, copy.deepcopy(content), "before")
    change(content)
    with pytest.raises(UsageError) as caught:
        parse(model, content, "file.yaml")
    text = str(caught.value)
    assert text.startswith("file.yaml"), "it names the file"
    assert "\n" not in text, "it is one line"
    return text


def test_the_examples_of_this_file_are_right() -> None:
    parse(Study, STUDY, "study")
    parse(Site, SITE, "site")


# What is refused.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("privcy", {}), ["unknown key 'privcy'", "did you mean 'privacy'"]),
        (put("training.round", 3), ["training", "unknown key 'round'", "did you mean 'rounds'"]),
        (put("modalities.labs.colums", {}), ["modalities.labs", "did you mean 'columns'"]),
        (put("modalities.labs.columns.sodium.hihg", 1), ["sodium", "did you mean 'high'"]),
        (put("modalities.labs.columns.sex.kategories", [1]), ["sex", "did you mean 'categories'"]),
        (put("aggregation.quorom", 2), ["did you mean 'quorum'"]),
        (put("aggregation.encoders/*", "mean"), ["unknown key 'encoders/*'"]),
        (put("aggregation.rules", "mean"), ["aggregation.rules", "valid dictionary"]),
        (put("qqqqqq", 1), ["unknown key 'qqqqqq'", "known keys: version, name, task"]),
    ],
    ids=lambda value: "",
)
def test_an_unknown_key_of_a_study_names_the_nearest(change: Change, words: list[str]) -> None:
    text = refusal(Study, change)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("polcy", {}), ["did you mean 'policy'"]),
        (put("policy.epsilom", 3), ["policy", "did you mean 'epsilon'"]),
        (put("data.records.patients", "p"), ["data.records", "did you mean 'patient'"]),
        (put("data.labs.colunms", {}), ["labs", "did you mean 'columns'"]),
        (put("data.labs.columns.sex.code", {}), ["sex", "did you mean 'codes'"]),
        (put("data.cxr.colum", "file"), ["cxr", "did you mean 'column'"]),
        (put("data", {"recods": {"file": "a.csv", "id": "id", "patient": "id"}}), ["data", "did you mean 'records'"]),
        (put("patients.max_record", 3), ["did you mean 'max_records'"]),
    ],
    ids=lambda value: "",
)
def test_an_unknown_key_of_a_site_names_the_nearest(change: Change, words: list[str]) -> None:
    text = refusal(Site, change)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("privacy.epsilon", 0), ["privacy.epsilon", "greater than 0", "found 0"]),
        (put("privacy.epsilon", -1), ["privacy.epsilon", "greater than 0"]),
        (put("privacy.epsilon", float("inf")), ["privacy.epsilon", "finite"]),
        (put("privacy.epsilon", float("nan")), ["privacy.epsilon"]),
        (put("privacy.delta", 1), ["privacy.delta", "less than 1"]),
        (put("privacy.delta", 0), ["privacy.delta", "greater than 0"]),
        (put("privacy.max_grad_norm", 0), ["privacy.max_grad_norm"]),
        (put("privacy.epsilon", True), ["privacy", "epsilon is a number, not true or false"]),
        (put("training.rounds", False), ["training", "rounds is a number"]),
        (put("seed", True), ["seed is a number"]),
        (put("sharing.policy", {"encoder/*": "share"}), ["sharing.policy.encoder/*", "'holders'", "found 'share'"]),
        (put("task.label", " "), ["task", "a label has a name"]),
        (put("name", "a" * 101), ["name", "at most 100"]),
        (put("modalities.imaging", {"size": 8}), ["modalities.imaging", "the key 'kind' is required"]),
        (put("privacy.unit", "record"), ["privacy.unit", "'patient'", "found 'record'"]),
        (put("modalities.labs.columns.sodium.low", 180), ["sodium", "low=180 must be below high=180"]),
        (put("modalities.labs.columns.sodium.log", "perhaps"), ["log", "found 'perhaps'"]),
        (put("modalities.vitals.columns.pulse", {"low": 0, "high": 9, "log": True}), ["positive range, low=0"]),
        (put("modalities.labs.kind", "tabel"), ["modalities.labs.kind", "unknown kind 'tabel'; did you mean 'table'"]),
        (put("modalities.Labs", {"kind": "text"}), ["Labs"]),
        (put("modalities", {}), ["modalities"]),
        (put("training.rounds", 0), ["training.rounds", "greater than or equal to 1", "found 0"]),
        (put("training.rounds", "many"), ["training.rounds", "found 'many'"]),
        (put("training.rounds", 2.5), ["training.rounds", "found 2.5"]),
        (put("training.momentum", 1), ["training.momentum", "less than 1"]),
        (put("version", 2), ["version", "this Gapweave reads version 1"]),
        (drop("version"), ["version", "this key is required"]),
        (drop("task.label"), ["task.label", "this key is required"]),
        (put("task.label", ["a"]), ["label is a list exactly when kind is multilabel"]),
        (put("task", {"kind": "multiclass", "label": "y"}), ["classes are given exactly when kind is multiclass"]),
        (put("task", {"kind": "multiclass", "label": "y", "classes": [1, 1.0]}), ["each once"]),
        (put("task", {"kind": "multiclass", "label": "y", "classes": [None, 1, 2]}), ["classes", "string"]),
        (put("modalities.labs.columns.sex", {"categories": [None, 1, 2]}), ["categories", "string"]),
        (put("sharing.policy", {"decoder/*": "local"}), ["'decoder/*' names no parameter group"]),
        (put("sharing.policy", {"imputer": "everyone"}), ["imputer"]),
        (put("evaluation", {"folds": 3, "fold": 3}), ["fold=3 must be below folds=3"]),
        (put("name", "../etc"), ["name"]),
        (put("training", [1, 2]), ["training"]),
    ],
    ids=lambda value: "",
)
def test_a_wrong_value_of_a_study_names_key_and_bound(change: Change, words: list[str]) -> None:
    text = refusal(Study, change)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("policy.epsilon", 0), ["policy.epsilon", "greater than 0"]),
        (put("policy.delta", 1), ["policy.delta", "less than 1"]),
        (put("policy.releases", ["update", "weights"]), ["policy.releases", "found 'weights'"]),
        (put("policy.unnoised", "maybe"), ["policy.unnoised", "found 'maybe'"]),
        (put("policy.min_patients", 0), ["policy.min_patients"]),
        (
            put("data.labs.columns.sodium", {"column": "na", "factor": 0}),
            ["columns.sodium.factor", "every value the same"],
        ),
        (put("data.labs.columns.sodium", {"column": "na", "factor": math.inf}), ["columns.sodium.factor", "finite"]),
        (put("data.labs.item", "code"), ["item and value come together"]),
        (put("split", {"by": "hash", "column": "fold"}), ["`by` or `column`, not both"]),
        (put("device", "gpu"), ["device", "found 'gpu'"]),
        (put("name", "north/south"), ["name"]),
        (drop("data.records"), ["data.records", "this key is required"]),
        (put("data", []), ["data"]),
    ],
    ids=lambda value: "",
)
def test_a_wrong_value_of_a_site_names_key_and_bound(change: Change, words: list[str]) -> None:
    text = refusal(Site, change)
    assert all(word in text for word in words), text


def test_further_problems_are_counted() -> None:
    content = {**copy.deepcopy(STUDY), "seed": -1, "training": {"rounds": 0}}
    with pytest.raises(UsageError, match=r"\(and 1 more\)"):
        parse(Study, content, "study")


def test_a_study_cannot_be_changed_after_it_was_read() -> None:
    study = parse(Study, STUDY, "study")
    with pytest.raises(ValueError, match="frozen"):
        study.training.rounds = 5


# YAML.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nname: a\nname: b\n", [":3", "the key 'name' is given twice"]),
        ("version: 1\nprivacy: {epsilon: 1, epsilon: 100}\n", [":2", "the key 'epsilon' is given twice"]),
        ("version: 1\nprivacy:\n  epsilon: 1\n  epsilon: 100\n", [":4", "'epsilon' is given twice"]),
        ("version: [1\n", ["not valid YAML"]),
        ("version: 1\n\tname: a\n", ["not valid YAML", ":2"]),
        ("- 1\n- 2\n", ["a mapping of keys to values"]),
        ("", ["a mapping of keys to values"]),
        ("version: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
        ("a: &a {b: *a}\n", ["not valid YAML"]),
        ("? [1, 2]\n: 3\n", ["not valid YAML"]),
        ("{a: 1}: 3\n", ["not valid YAML"]),
    ],
    ids=range(11),
)
def test_a_file_that_is_no_mapping_names_the_line(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_yaml(file, "study")
    assert all(word in str(caught.value) for word in [str(file), *words]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no study file"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_site(tmp_path)
    (tmp_path / "site.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_site(tmp_path / "site.yaml")


def test_files_of_two_kinds_that_were_mixed_up(tmp_path: Path) -> None:
    study, site = tmp_path / "study.yaml", tmp_path / "site.yaml"
    study.write_text("version: 1\nname: a\ntask: {}\nmodalities: {}\n", encoding="utf-8")
    site.write_text("version: 1\nname: a\ndata: {}\n", encoding="utf-8")
    with pytest.raises(
        UsageError, match=r"site\.yaml: this is a site file, not a study file\. Give the study file here"
    ):
        load_study(site)
    with pytest.raises(UsageError, match="this is a study file, not a site file"):
        load_site(study)
    with pytest.raises(UsageError, match="this is a site file, not a connection file"):
        load_connection(site)


def test_a_merge_key_is_no_key_given_twice(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("base: &base {low: 1, high: 2}\nother: {<<: *base, high: 3}\n", encoding="utf-8")
    assert read_yaml(file, "study")["other"] == {"low": 1, "high": 3}


def test_only_true_and_false_are_booleans(tmp_path: Path) -> None:
    """In YAML 1.1 `codes: {yes: 1, no: 0}` mapped the codes True and False, and no cell matched."""
    file = tmp_path / "site.yaml"
    file.write_text("codes: {yes: 1, no: 0}\ncolumn: NO\nflags: [on, Off, true, FALSE, y]\n", encoding="utf-8")
    content = read_yaml(file, "site")
    assert content["codes"] == {"yes": 1, "no": 0}
    assert content["column"] == "NO"
    assert content["flags"] == ["on", "Off", True, False, "y"]
    file.write_text(yaml.safe_dump({**STUDY, "privacy": {"enabled": "no"}}).replace("'no'", "no"), encoding="utf-8")
    assert load_study(file).privacy.enabled is False


# What is the same study.


def reverse(value: Any) -> Any:
    """The same mapping with all keys in the reverse order; lists keep theirs."""
    if isinstance(value, dict):
        return {key: reverse(value[key]) for key in reversed(value)}
    return value


def test_the_order_of_keys_and_modalities_does_not_change_a_study() -> None:
    one, other = parse(Study, STUDY, "study"), parse(Study, reverse(copy.deepcopy(STUDY)), "study")
    assert list(one.modalities) != list(other.modalities)
    assert one.canonical() == other.canonical()
    assert one.sha256 == other.sha256
    assert one.order == other.order == ("cxr", "labs", "note", "vitals")
    for group in ("encoder/cxr", "encoder/labs", "head/labs", "imputer", "fusion"):
        assert one.sharing.of(group) == other.sharing.of(group)
        assert one.aggregation.of(group) == other.aggregation.of(group)


def test_defaults_written_out_are_the_same_study() -> None:
    content = {**copy.deepcopy(STUDY), "privacy": {"enabled": True, "epsilon": 8}, "seed": 0}
    assert parse(Study, content, "study").sha256 == parse(Study, STUDY, "study").sha256


@pytest.mark.parametrize(
    "change",
    [
        put("privacy.epsilon", 7.999),
        put("seed", 1),
        put("modalities.labs.columns.sodium.high", 181),
        put("modalities.labs.columns.sex.categories", [1, 0]),
        put("aggregation.encoder/*", "auto"),
        put("sharing.policy", {"encoder/*": "holders"}),
        put("training.finetune", True),
        put("name", "other"),
    ],
)
def test_every_setting_changes_the_hash(change: Change) -> None:
    content = copy.deepcopy(STUDY)
    change(content)
    assert parse(Study, content, "study").sha256 != parse(Study, STUDY, "study").sha256


def test_a_resolved_study_survives_yaml_and_json(tmp_path: Path) -> None:
    study = parse(Study, STUDY, "study")
    file = tmp_path / "study.yaml"
    file.write_text(study.to_yaml(), encoding="utf-8")
    assert load_study(file) == study
    assert load_study(file).sha256 == study.sha256
    assert study_from_json(study.canonical()) == study
    written = yaml.safe_load(study.to_yaml())
    assert written["training"]["momentum"] == 0.0, "defaults are written out"
    assert written["aggregation"]["encoder/*"] == "mean", "rules are written as flat keys"
    assert "rules" not in written["aggregation"]


def test_codes_are_compared_as_text() -> None:
    for codes in ([0, 1], ["0", "1"], [0.0, "1.0"]):
        content = copy.deepcopy(STUDY)
        content["modalities"]["labs"]["columns"]["sex"]["categories"] = codes
        assert parse(Study, content, "study").sha256 == parse(Study, STUDY, "study").sha256


def test_a_study_that_came_over_the_wire_is_checked_like_a_file() -> None:
    content = json.loads(parse(Study, STUDY, "study").canonical())
    with pytest.raises(UsageError, match="unknown key 'extra'"):
        study_from_json(json.dumps({**content, "extra": 1}))


# Group patterns.


def test_rules_of_aggregation_by_group_pattern() -> None:
    content = copy.deepcopy(STUDY)
    content["aggregation"] = {"default": "auto", "encoder/*": "mean", "head/labs": "other", "*": "all", "quorum": 2}
    aggregation = parse(Study, content, "study").aggregation
    assert aggregation.rules == {"encoder/*": "mean", "head/labs": "other", "*": "all"}
    assert aggregation.of("encoder/labs") == "mean"
    assert aggregation.of("head/labs") == "other"
    assert aggregation.of("head/note") == "all", "the most specific pattern decides"
    assert parse(Study, STUDY, "study").aggregation.of("fusion") == "auto"


@pytest.mark.parametrize(
    "block", [{"aggregation": {"head/lab": "mean"}}, {"sharing": {"policy": {"head/lab": "local"}}}]
)
def test_a_pattern_that_matches_no_group_is_refused(block: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unknown parameter group 'head/lab'; did you mean 'head/labs'"):
        parse(Study, {**copy.deepcopy(STUDY), **block}, "study")


@pytest.mark.parametrize("value", [[30], 30, 0.0, "some", None, True, ["a"]])
def test_a_prevalence_lies_between_0_and_1(value: Any) -> None:
    with pytest.raises(UsageError, match="public prevalences between 0 and 1, found"):
        parse(Study, {**copy.deepcopy(STUDY), "preparation": {"class_balance": value}}, "study")


def test_a_sharing_map_may_be_written_without_the_word_policy() -> None:
    content = copy.deepcopy(STUDY)
    content["sharing"] = copy.deepcopy(content["sharing"]["policy"])
    assert parse(Study, content, "study").sha256 == parse(Study, STUDY, "study").sha256


def test_a_key_is_named_as_the_file_has_it(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    content = copy.deepcopy(STUDY)
    content["modalities"]["labs"]["columns"]["sodium"]["low"] = "x"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(UsageError, match=r"study\.yaml:modalities\.labs\.columns\.sodium\.low: "):
        load_study(file)
    del content["modalities"]["labs"]["columns"]["sodium"]["low"]
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(UsageError, match=r"study\.yaml:modalities\.labs\.columns\.sodium\.low: this key is required"):
        load_study(file)


def test_the_examples_of_the_page_on_site_files_are_valid() -> None:
    """Every block of a study's modalities, `data` block and single source of docs/study-and-site.md."""
    page = (Path(__file__).parents[1] / "docs" / "study-and-site.md").read_text(encoding="utf-8")
    examples = [
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    ]
    studies = [example for example in examples if "modalities" in example]
    shown = [parse(Study, {**STUDY, **example, "sharing": {}}, "page") for example in studies]
    assert [study.order for study in shown] == [("labs", "sepsis", "shock", "vitals")]
    records = {"file": "records.csv", "id": "id", "patient": "patient"}
    sites = [
        parse(Site, {"version": 1, "name": "a", "data": example.get("data", {"records": records, **example})}, "page")
        for example in examples
        if example not in studies
    ]
    assert len(sites) >= 4
    kinds = {type(source).__name__ for site in sites for source in site.data.modalities.values()}
    assert kinds == {"ColumnsSource", "TextSource", "ImageSource", "MeasurementSource", "ClinicalSource"}
