"""What `--set` and `--vary` may say: paths, aliases, methods and recipes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_config import STUDY

from gapweave.shared.config import Study, load_study
from gapweave.shared.config.base import parse
from gapweave.shared.config.overrides import ALIASES, METHODS, apply, expand, parse_assignment, parse_variation
from gapweave.shared.config.recipes import RECIPES
from gapweave.shared.errors import UsageError
from gapweave.shared.fusion import FUSIONS
from gapweave.shared.schemes import SCHEMES, build_scheme
from gapweave.sites.study_check import check_names

RULE = {"kind": "public_score", "low": 100, "high": 180, "expression": "labs.sodium"}


def test_every_alias_and_method_leads_to_keys_of_the_study() -> None:
    for alias, path in ALIASES.items():
        assert expand(alias, 3) == {path: 3}
        part, name = path.split(".")
        assert name in type(getattr(parse(Study, STUDY, "study"), part)).model_fields, path
    for name, preset in METHODS.items():
        study = parse(Study, apply(STUDY, {"method": name}), "study")
        assert preset.get("model.fusion", study.model.fusion) == study.model.fusion
        assert preset.get("scheme.name", study.scheme.name) == study.scheme.name
        check_names(study)


def test_methods_are_comparable() -> None:
    """Each fusion and scheme is one; all set the same parts; an imputer is there where something reads it."""
    fusions, schemes = (
        [name for name in registry if registry[name].__module__.startswith("gapweave.")]
        for registry in (FUSIONS, SCHEMES)
    )
    assert {name: METHODS[name]["model.fusion"] for name in fusions} == {name: name for name in fusions}
    for name in fusions:
        assert METHODS[name]["model.imputer"] == ("cra" if FUSIONS[name].reads_slots else "none"), name
    for name in set(schemes) - {"none", *fusions}:  # the method dwfuse is the fusion, which trains as the scheme does
        assert METHODS[name] == {**METHODS["concat"], "model.imputer": "none", "scheme.name": name}
    assert all(preset.keys() >= {"model.fusion", "model.imputer", "scheme.name"} for preset in METHODS.values())


def test_omnifuse_can_be_had_without_each_of_its_parts() -> None:
    """Table 4 is one comparison; each part is also switched off by one key."""
    whole = METHODS["omnifuse"]
    assert whole == {"model.fusion": "dwfuse", "model.imputer": "cra_cycle", "scheme.name": "tla"}
    less = {name: preset for name, preset in METHODS.items() if name.startswith("omnifuse_no_")}
    assert len(less) == 5
    assert all(preset != whole for preset in less.values())
    for key, value in (("imputer", "none"), ("imputer", "cra"), ("fusion", "concat"), ("scheme", "modality_dropout")):
        study = parse(Study, apply(STUDY, {"method": "omnifuse", key: value}), "study")
        check_names(study)
        preset = expand("method", "omnifuse") | expand(key, value)
        assert preset in less.values()
    hidden = parse(Study, apply(STUDY, {"method": "omnifuse_no_dropout"}), "study")
    assert build_scheme(hidden).hide == 0 < build_scheme(parse(Study, apply(STUDY, {"method": "omnifuse"}), "s")).hide


def test_a_recipe_is_a_word_for_many_keys_and_a_key_beside_it_counts() -> None:
    content = {**STUDY, "modalities": {**STUDY["modalities"], "rule": RULE}}
    small = parse(Study, apply(content, {"training.rounds": 7, "recipe": "small", "method": "concat"}), "study")
    assert small.training.schedule == "fedsgd"
    assert small.training.rounds == 7, "also where it stands before the recipe"
    assert (small.model.fusion, small.model.imputer) == ("concat", "cra"), "a method is narrower than a recipe"
    linear = parse(Study, apply(content, {"recipe": "linear"}), "study")
    encoders = {name: spec.encoder for name, spec in linear.modalities.items()}
    assert encoders == {**dict.fromkeys(("vitals", "labs", "cxr", "note"), "none"), "rule": None}
    other = {"model": {"imputer": "cra", "imputer_settings": {"weight": 10}}, "training": {"momentum": 0.9}}
    for recipe in RECIPES:
        check_names(parse(Study, apply({**content, **other}, {"recipe": recipe}), "study"))
    passes = {**content, "training": {"passes": 2}}
    assert parse(Study, apply(passes, {"recipe": "small"}), "study").training.passes is None
    assert apply(content, {"recipe": "none"}) == content
    with pytest.raises(UsageError, match="no recipe is called 'smal'"):
        apply(content, {"recipe": "smal"})


def test_overrides_are_written_into_a_copy() -> None:
    before = copy.deepcopy(STUDY)
    overrides = {"epsilon": 2, "training.lr": "1e-3", "aggregation.encoder/*": "auto", "method": "concat"}
    study = parse(Study, apply(STUDY, overrides), "study")
    assert before == STUDY
    assert (study.privacy.epsilon, study.training.lr, study.model.fusion) == (2.0, 1e-3, "concat")
    assert study.aggregation.of("encoder/labs") == "auto"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"traning.rounds": 3}, "did you mean 'training'"),
        ({"name.first": 3}, "is no path in the study"),
        ({"method": "magic"}, "no method is called 'magic'"),
        ({"method": ["late"]}, "no method is called"),
        ({"epsilon": 0}, "greater than 0"),
        ({"training.rounds.": 1}, "training"),
    ],
    ids=str,
)
def test_an_override_that_leads_nowhere_is_refused(tmp_path: Path, overrides: dict[str, Any], words: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        load_study(file, overrides)


def test_an_option_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    with pytest.raises(UsageError, match=r"command line:privacy\.epsilon.*Correct that option"):
        load_study(file, {"epsilon": -3})
    file.write_text(yaml.safe_dump(STUDY | {"seed": "x"}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"study\.yaml:seed.*Correct that key"):
        load_study(file, {"training.rounds": 3})


def test_assignments_are_read_as_yaml() -> None:
    assert parse_assignment("privacy.enabled=false") == ("privacy.enabled", False)
    assert parse_assignment(" seed = 3") == ("seed", 3)
    assert parse_assignment("sharing={imputer: local}") == ("sharing", {"imputer": "local"})
    assert parse_assignment("name=a=b") == ("name", "a=b")
    assert parse_variation("fusion=late,concat") == ("fusion", ["late", "concat"])
    assert parse_variation("epsilon=1,8.5") == ("epsilon", [1, 8.5])
    for text in ("seed", "=3", " = 3"):
        with pytest.raises(UsageError, match="is not key=value"):
            parse_assignment(text)
    with pytest.raises(UsageError, match="cannot be read"):
        parse_assignment("seed=[1")
    for text in ("seed", "seed=", "=1,2"):
        with pytest.raises(UsageError, match="is not key=v1,v2"):
            parse_variation(text)
