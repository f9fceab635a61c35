"""Range cards, and the distances from a reference interval as inputs."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from cohorts import LABS, SODIUM, VITALS, Hospital, study
from commandline import done

from gapweave.client.sources.units import conversion
from gapweave.shared.config import library
from gapweave.shared.config.modalities import Range
from gapweave.shared.config.study import Study, study_from_json
from gapweave.shared.encoders import build_encoder
from gapweave.shared.features import series, table
from gapweave.shared.features.flat import flat, width
from gapweave.shared.features.numeric import numeric_columns
from gapweave.shared.features.ranges import BOUND, scale
from gapweave.shared.schema import modalities

# Inside [135, 145], scaled by (x - 140) / 6: the ends are at -5/6 and 5/6.
NORMAL = {**SODIUM, "normal": [135, 145]}


def columns_of(**cards: dict) -> dict[str, Range]:
    return {name: Range.model_validate(card) for name, card in cards.items()}


# Tables.


def test_a_reference_interval_adds_the_distances_above_and_below() -> None:
    values = np.array([140.0, 135.0, 145.0, 151.0, 129.0, np.nan, 500.0])
    columns = columns_of(sodium=NORMAL)
    inputs, present = table.encode(columns, {"sodium": values}, len(values))
    assert table.names(columns) == ["sodium", "sodium:observed", "sodium:above", "sodium:below"]
    assert table.width(columns) == 4
    assert inputs[:, 2] == pytest.approx([0, 0, 0, 1, 0, 0, BOUND - 5 / 6], abs=1e-6)
    assert inputs[:, 3] == pytest.approx([0, 0, 0, 0, 1, 0, 0], abs=1e-6)
    assert present.tolist() == [True] * 5 + [False, True]


def test_distances_of_a_logarithmic_variable_are_logarithmic() -> None:
    columns = columns_of(x={"low": 1, "high": 10_000, "center": 10, "scale": 1, "log": True, "normal": [10, 100]})
    inputs, _ = table.encode(columns, {"x": np.array([1.0, 200.0])}, 2)
    assert inputs[:, 2] == pytest.approx([0, np.log(2)], abs=1e-6)
    assert inputs[:, 3] == pytest.approx([np.log(10), 0], abs=1e-6)


def test_other_variables_keep_their_inputs_and_their_order() -> None:
    content = copy.deepcopy(LABS)
    values = {"sodium": np.array([151.0, np.nan]), "temperature": np.array([36.0, 38.0]), "sex": np.array(["1", None])}
    before, _ = table.encode(study({"labs": content}).modalities["labs"].columns, values, 2)
    content["columns"]["sodium"] = NORMAL
    after, _ = table.encode(study({"labs": content}).modalities["labs"].columns, values, 2)
    names = table.names(study({"labs": content}).modalities["labs"].columns)
    kept = [at for at, name in enumerate(names) if not name.endswith((":above", ":below"))]
    assert len(names) == len(kept) + 2
    assert after[:, kept].tobytes() == before.tobytes()


def test_positions_of_values_step_over_the_distances() -> None:
    content = copy.deepcopy(LABS)
    content["columns"]["glucose"]["normal"] = [4, 7]
    of = study({"labs": content})
    names = table.names(of.modalities["labs"].columns)
    for column in numeric_columns(of, ["labs"]):
        assert names[column.value] == column.name
        assert names[column.flag] == f"{column.name}:observed"


# Series.


def hours_of(*rows: list[tuple[int, float]]) -> torch.Tensor:
    """[R, 4, 2] of one variable: by row, (hour, scaled value)."""
    inputs = torch.zeros(len(rows), 4, 2)
    for at, row in enumerate(rows):
        for hour, value in row:
            inputs[at, hour] = torch.tensor([value, 1.0])
    return inputs


def test_summary_of_a_series_gains_the_distances_of_last_mean_maximum_and_minimum() -> None:
    # The interval ends at -1 and 1. First row: mean 1, last -3, minimum -3, maximum 4.
    columns = columns_of(x={"low": -50, "high": 50, "center": 0, "scale": 1, "normal": [-1, 1]})
    inputs = hours_of([(0, 4.0), (1, 2.0), (3, -3.0)], [(2, 0.5)], [])
    plain = series.summary(inputs, columns_of(x={"low": -50, "high": 50, "center": 0, "scale": 1}))
    found = series.summary(inputs, columns)
    assert plain.shape[1] == 8
    assert found.shape[1] == series.summary_width(columns) == 14
    assert torch.equal(found[:, :8], plain)
    above, below = found[:, 8:11], found[:, 11:]
    assert above.tolist() == [[0, 0, 3], [0, 0, 0], [0, 0, 0]], "last, mean, maximum"
    assert below.tolist() == [[2, 0, 2], [0, 0, 0], [0, 0, 0]], "last, mean, minimum"


def test_a_variable_never_observed_is_at_no_distance_though_zero_is_outside() -> None:
    columns = columns_of(x={"low": 0, "high": 50, "center": 10, "scale": 1, "normal": [20, 30]})
    assert series.summary(hours_of([]), columns)[0, 8:].tolist() == [0] * 6


def test_the_encoder_of_a_series_reads_the_distances() -> None:
    content = copy.deepcopy(VITALS)
    content["columns"]["pulse"]["normal"] = [60, 100]
    (modality,) = modalities(study({"vitals": content}))
    assert modality.shape == (24, 4), "the input itself does not change"
    encoder = build_encoder(modality, 4)
    features = encoder.features(torch.zeros(2, 24, 4))
    assert features.shape == (2, 24 * 4 + 2 * 8 + 6)
    assert encoder.embed(features).shape == (2, 4)


def test_a_series_variable_with_an_interval_is_not_standardised_by_noise() -> None:
    """Its distances are measured in the scaling of the study, which noisy standardisation would move."""
    content = copy.deepcopy(VITALS)
    content["columns"]["bp"]["normal"] = [90, 120]
    (column,) = numeric_columns(study({"vitals": content}), ["vitals"])
    assert (column.name, column.value, column.flag) == ("pulse", 1, 3)


# Cards.


def labs(**columns: dict) -> Study:
    return study({"labs": {"kind": "table", "columns": columns}})


@pytest.mark.parametrize("name", library.cards())
def test_every_card_is_a_range_with_a_source(name: str) -> None:
    card = labs(x={"card": name}).modalities["labs"].columns["x"]
    assert card.low <= card.center <= card.high
    assert card.scale is not None
    source = library.cards()[name]["source"]
    assert source in library.sources()
    assert (source == "Gapweave") == (card.normal is None), "an interval has a published source"
    ends = scale(np.array([card.low, card.high, *(card.normal or ())]), card)
    assert np.isfinite(ends).all()
    if card.normal is not None:
        assert np.abs(ends[2:]).max() < 4, "a normal value is near the usual one"
    if card.unit is not None:
        assert conversion(card.unit, card.unit, card.molar_mass, "here") == (1, 0)


def test_a_card_is_written_out_when_the_study_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    one = labs(sodium={"card": "sodium"})
    written = {"low": 100, "high": 180, "center": 140, "scale": 5, "unit": "mmol/L", "normal": [136, 145]}
    assert one.sha256 == labs(sodium=written).sha256
    assert "card" not in one.canonical()
    monkeypatch.setattr(library, "cards", dict)
    assert study_from_json(one.canonical()) == one, "the installed library plays no part any more"
    assert yaml.safe_load(one.to_yaml())["modalities"]["labs"]["columns"]["sodium"]["normal"] == [136, 145]


def test_what_stands_beside_a_card_wins() -> None:
    card = labs(x={"card": "sodium", "high": 200, "normal": None}).modalities["labs"].columns["x"]
    assert (card.low, card.high, card.normal) == (100, 200, None)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"card": "sodum"}, "unknown card 'sodum'; did you mean 'sodium'"),
        ({"card": "creatinine", "unit": "umol/L"}, "'creatinine' is in mg/dL"),
        ({"card": "sodium", "hgih": 3}, "did you mean 'high'"),
        ({"card": "sodium", "low": 140}, r"normal=\[136, 145\] must ascend, inside \[140, 180\]"),
        ({**SODIUM, "normal": [145, 135]}, "must ascend"),
        ({**SODIUM, "normal": [90, 145]}, r"inside \[100, 180\]"),
    ],
    ids=str,
)
def test_a_wrong_card_or_interval_is_refused(card: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        labs(x=card)


def test_a_hospital_reads_a_card_in_its_own_unit(tmp_path) -> None:
    hospital = Hospital(tmp_path)
    hospital.records(2)
    hospital.write("labs.csv", {"id": ["r0", "r1"], "crea": [88.4, 353.6]})
    hospital.add("labs", file="labs.csv", columns={"creatinine": {"column": "crea", "unit": "umol/L"}})
    inputs = hospital.load(labs(creatinine={"card": "creatinine"})).batch.inputs["labs"]
    # 1 and 4 mg/dL, center 1, log scale 0.6, normal up to 1.3.
    assert inputs[:, 0].tolist() == pytest.approx([0, np.log(4) / 0.6], abs=1e-3)
    assert inputs[:, 2].tolist() == pytest.approx([0, np.log(4 / 1.3) / 0.6], abs=1e-3)


def test_cards_are_listed_for_people_and_machines() -> None:
    lines = done("study", "cards").out.splitlines()
    (line,) = [line for line in lines if line.startswith("sodium ")]
    assert line.split() == ["sodium", "mmol/L", "100", "to", "180", "136", "to", "145", "ABIM"]
    told = json.loads(done("study", "cards", "--json").out)
    assert told["cards"]["sodium"]["normal"] == [136, 145]
    assert {card["source"] for card in told["cards"].values()} == set(told["sources"])


def test_linear_models_read_the_distances_too() -> None:
    content = {"labs": {"kind": "table", "columns": {"sodium": NORMAL}}, "vitals": copy.deepcopy(VITALS)}
    content["vitals"]["columns"]["pulse"]["normal"] = [60, 100]
    content["score"] = {"kind": "public_score", "expression": "sodium - 140", "low": -40, "high": 40}
    widths = {"labs": 4, "score": 2, "vitals": 2 * 8 + 6}
    for modality in modalities(study(content)):
        features = flat(modality.spec, torch.zeros(3, *modality.shape))
        assert features.shape == (3, widths[modality.name])
        assert width(modality.spec) == widths[modality.name]
