"""Drawing one synthetic hospital: latents, labels with their true probability, and what a modality shows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from gapweave.sites.demo.words import FILLER, FINDINGS
from gapweave.sites.demo.world import LABS, LATENTS, MODALITIES, VITALS, Variable, World

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """One hospital's patients as arrays; R records.

    Attributes:
        patient: [R] int, number of the record's patient, ascending.
        male: [R] bool.
        oracle: [R], true probability of the label given all latents.
        label: [R] int, drawn with that probability.
        present: [R, 4] bool, modalities in canonical order; at least one a record.
        vitals: [R, T, V] in the study's units, NaN where not charted.
        labs: [R, K] in the study's units, NaN where not measured.
        scans: [R, S, S] uint8.
        notes: R texts.
    """

    patient: NDArray[np.int64]
    male: NDArray[np.bool_]
    oracle: Floats
    label: NDArray[np.int64]
    present: NDArray[np.bool_]
    vitals: Floats
    labs: Floats
    scans: NDArray[np.uint8]
    notes: list[str]


def draw_cohort(
    world: World, *, seed: int, hospital: int, patients: int, holds: Collection[str], missing: float
) -> Cohort:
    """Draw one hospital.

    Args:
        world: the constants.
        seed: of the whole demo; a hospital depends on it and on its own number alone.
        hospital: number of the hospital.
        patients: how many.
        holds: modalities that the hospital holds.
        missing: share of its held modalities that a record lacks.
    """
    # Separate streams: a hospital's devices and case mix stay when its number of patients changes.
    shift, rng = (np.random.default_rng([seed, hospital, stream]) for stream in (0, 1))
    patient = _visits(world, patients, rng)
    male = (rng.random(patients) < 0.5)[patient]
    latents = _latents(world, patient, shift, rng)
    latents[:, LATENTS.index("perfusion")] += world.male_perfusion * male
    oracle = _probability(world, latents, world.base_shift * shift.normal())
    return Cohort(
        patient=patient,
        male=male,
        oracle=oracle,
        label=(rng.random(len(patient)) < oracle).astype(np.int64),
        present=_present(len(patient), holds, missing, rng),
        vitals=_vitals(world, latents, shift, rng),
        labs=_labs(world, latents, shift, rng),
        scans=_scans(world, latents, shift, rng),
        notes=_notes(world, latents, shift, rng),
    )


def _visits(world: World, patients: int, rng: Generator) -> NDArray[np.int64]:
    chance = rng.random(patients)
    records = 1 + (chance < world.second_record) + (chance < world.third_record)
    return np.repeat(np.arange(patients), records)


def _latents(world: World, patient: NDArray[np.int64], shift: Generator, rng: Generator) -> Floats:
    mean = world.latent_shift * shift.normal(size=len(LATENTS))
    lasting = rng.normal(size=(patient[-1] + 1, len(LATENTS)))[patient]
    passing = rng.normal(size=lasting.shape)
    latents: Floats = mean + np.sqrt(1 - world.visit_share) * lasting + np.sqrt(world.visit_share) * passing
    return latents


def _probability(world: World, latents: Floats, base: float) -> Floats:
    product = latents[:, LATENTS.index("infiltrate")] * latents[:, LATENTS.index("heart")]
    score = latents @ np.array(world.weights) + world.interaction * product + world.base + base
    probability: Floats = 1 / (1 + np.exp(-world.steepness * score))
    return probability


def _present(records: int, holds: Collection[str], missing: float, rng: Generator) -> NDArray[np.bool_]:
    held = np.array([name in holds for name in MODALITIES])
    chance = rng.random((records, len(MODALITIES)))
    present: NDArray[np.bool_] = held & (chance >= missing)
    kept = np.where(held, chance, -1).argmax(axis=1)
    present[np.arange(records), kept] = True
    return present


def _blurred(latents: Floats, blur: float, rng: Generator) -> Floats:
    return latents + blur * rng.normal(size=latents.shape)


def _effects(table: Mapping[str, Variable], of: Callable[[Variable], dict[str, float] | None]) -> Floats:
    """Loadings [L, V] of the latents on a table's variables, in the order of its names."""
    loadings = np.zeros((len(LATENTS), len(table)))
    for column, name in enumerate(sorted(table)):
        for latent, weight in (of(table[name]) or {}).items():
            loadings[LATENTS.index(latent), column] = weight
    return loadings


def _in_units(world: World, standard: Floats, table: Mapping[str, Variable], shift: Generator, digits: int) -> Floats:
    """Pass standardised values through the hospital's devices, into units, rounded as a chart does."""
    cards = [table[name] for name in sorted(table)]
    gain = 1 + world.gain_shift * shift.normal(size=len(cards))
    read = standard * gain + world.offset_shift * shift.normal(size=len(cards))
    center, scale = (np.array([getattr(card, key) for card in cards]) for key in ("center", "scale"))
    log = np.array([card.log for card in cards])
    values = np.where(log, center * np.exp(scale * read), center + scale * read)
    low, high = (np.array([getattr(card, key) for card in cards]) for key in ("low", "high"))
    units: Floats = np.clip(values, low, high).round(digits)
    return units


def _vitals(world: World, latents: Floats, shift: Generator, rng: Generator) -> Floats:
    seen = _blurred(latents, world.vitals_blur, rng)
    records, hours, width = len(seen), world.hours, len(VITALS)
    time = np.linspace(-0.5, 0.5, hours)[None, :, None]
    level = (seen @ _effects(VITALS, lambda card: card.level))[:, None, :]
    slope = (seen @ _effects(VITALS, lambda card: card.trend))[:, None, :]
    phase = rng.uniform(0, 2 * np.pi, (records, 1, width))
    standard = level + slope * time + world.circadian * np.sin(2 * np.pi * time + phase)
    standard += world.vitals_noise * rng.normal(size=(records, hours, width))
    values = _in_units(world, standard, VITALS, shift, 1)
    values[rng.random(values.shape) < world.hour_missing] = np.nan
    return values


def _labs(world: World, latents: Floats, shift: Generator, rng: Generator) -> Floats:
    seen = _blurred(latents, world.labs_blur, rng)
    flat = world.labs_saturation * np.tanh(seen / world.labs_saturation)
    standard = flat @ _effects(LABS, lambda card: card.level)
    standard += world.labs_noise * rng.normal(size=standard.shape)
    values = _in_units(world, standard, LABS, shift, 2)
    gone = rng.random(values.shape) < world.lab_missing
    gone[np.arange(len(gone)), rng.integers(values.shape[1], size=len(gone))] = False
    values[gone] = np.nan
    return values


def _scans(world: World, latents: Floats, shift: Generator, rng: Generator) -> NDArray[np.uint8]:
    """A chest in grey: infiltrate is a blob in one lung, heart and effusion brighten fixed places.

    `worsening` is the contrast of a fine grating whose phase is random: its mean over patients is nothing,
    so a linear reader of pixels cannot see it.
    """
    size = world.scan_size
    seen = {name: _blurred(latents[:, at], world.scan_blur, rng)[:, None, None] for at, name in enumerate(LATENTS)}
    row, column = np.mgrid[0:size, 0:size] / (size - 1)
    left, right = _blob(row, column, 0.4, 0.25), _blob(row, column, 0.4, 0.75)
    side = rng.random((len(latents), 1, 1)) < 0.5
    phase = rng.uniform(0, 2 * np.pi, (len(latents), 1, 1))
    picture = seen["infiltrate"] * np.where(side, left, right) * 1.4
    picture = picture + seen["heart"] * _blob(row, column, 0.6, 0.5)
    picture = picture + seen["renal"] * np.clip(row - 0.75, 0, None) * 4
    picture = picture + np.exp(0.5 * seen["worsening"] - 0.5) * np.sin(np.pi * (size - 1) * column / 2 + phase)
    picture = picture - 1.5 * (left + right)
    picture = picture + 0.7 * (seen["habitus"] + seen["age"] * (row - 0.5) * 2)
    picture = picture * (1 + world.gain_shift * shift.normal()) + world.offset_shift * shift.normal()
    grey = 128 + world.scan_contrast * picture + world.scan_noise * rng.normal(size=picture.shape)
    pixels: NDArray[np.uint8] = np.clip(grey, 0, 255).astype(np.uint8)
    return pixels


def _blob(row: Floats, column: Floats, at_row: float, at_column: float) -> Floats:
    blob: Floats = np.exp(-((row - at_row) ** 2 + (column - at_column) ** 2) / (2 * 0.14**2))
    return blob


def _notes(world: World, latents: Floats, shift: Generator, rng: Generator) -> list[str]:
    """Each word speaks of a random latent, high or low as the patient is, or of nothing.

    A hospital prefers some synonyms to others.
    """
    names = list(FINDINGS)
    seen = _blurred(latents[:, [LATENTS.index(name) for name in names]], world.note_blur, rng)
    longest = world.words[1]
    shape = (len(seen), longest)
    topic = rng.integers(len(names), size=shape)
    chance_high = 1 / (1 + np.exp(-world.topic_slope * np.take_along_axis(seen, topic, axis=1)))
    low = (rng.random(shape) >= chance_high).astype(np.int64)
    synonyms = len(FINDINGS[names[0]][0])
    habit = shift.dirichlet(np.full(synonyms, 2.0))
    synonym = rng.choice(synonyms, p=habit, size=shape)
    lexicon = np.array([[FINDINGS[name][side] for side in (0, 1)] for name in names])
    filler = np.array(FILLER)[rng.choice(len(FILLER), p=shift.dirichlet(np.full(len(FILLER), 2.0)), size=shape)]
    words = np.where(rng.random(shape) < world.topic_share, lexicon[topic, low, synonym], filler)
    length = rng.integers(world.words[0], longest + 1, size=len(seen))
    return [" ".join(line[:count]) for line, count in zip(words.tolist(), length, strict=True)]
