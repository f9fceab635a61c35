"""The frozen constants of the synthetic world. Everything else is the seed, the hospitals and who holds what.

A patient is some independent Gaussian latents. A logistic model with one interaction gives the label's true
probability, and each modality shows some of the latents: several show the same one, so that a missing
modality can partly be told from the others. Vitals carry most (the dominant modality). Labs are nearly
noise-free and undisturbed, but show little and saturate: a model fits them first and then stops looking (the
lazy modality). Scans need a non-linear reader for one of their latents.

Measured with logistic regression on fixed features (three seeds, mean over the six hospitals): pooled AUROC
.83, each hospital alone .80; at the three smallest .79-.84 against .74-.80. Alone, vitals give .79, scans
.75, notes and labs .69. The oracle, who knows the latents, has .97.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from gapweave.shared.errors import UsageError
from gapweave.sites.demo.words import FILLER, FINDINGS

MODALITIES = ("labs", "note", "scan", "vitals")
"""The modalities in canonical order."""

LABEL = "deteriorated"
"""Name of the label."""

LATENTS = (
    "perfusion", "oxygen", "infiltrate", "worsening", "heart", "renal", "frailty", "metabolic",
    "arousal", "habitus", "age",
)  # fmt: skip
"""Names of the latents. Higher is worse; the last three only disturb: they move values and not the label."""

_NAMES = (
    "alder",
    "birch",
    "cedar",
    "elm",
    "hazel",
    "juniper",
    "larch",
    "maple",
    "oak",
    "pine",
    "rowan",
    "willow",
)


@dataclass(frozen=True)
class Variable:
    """A measured variable: how latents move it, and its public range.

    Attributes:
        level: latent -> standardised shift of the value.
        trend: latent -> standardised shift from the first to the last hour (series only).
        center: value at standardised 0, in `unit`.
        scale: one standardised step, of the logarithm when `log`.
        low: lowest plausible value.
        high: highest plausible value.
        unit: the study's unit.
        log: log-normal.
        molar_mass: g/mol, for hospitals that report another unit.
    """

    level: dict[str, float]
    center: float
    scale: float
    low: float
    high: float
    unit: str
    log: bool = False
    molar_mass: float | None = None
    trend: dict[str, float] | None = None


VITALS = {
    "dia_bp": Variable(
        {"perfusion": -0.4, "arousal": 0.5, "age": -0.6}, 68, 12, 10, 200, "mmHg", trend={"worsening": -0.6}
    ),
    "heart_rate": Variable(
        {"perfusion": 0.5, "infiltrate": 0.3, "arousal": 0.8},
        85,
        18,
        20,
        250,
        "1/min",
        trend={"worsening": 0.9},
    ),
    "resp_rate": Variable(
        {"oxygen": 0.5, "infiltrate": 0.3, "arousal": 0.6}, 18, 5, 2, 80, "1/min", trend={"worsening": 0.6}
    ),
    "spo2": Variable({"oxygen": -0.6, "habitus": -0.7}, 94, 2, 30, 100, "percent"),
    "sys_bp": Variable(
        {"perfusion": -0.6, "arousal": 0.6, "age": 0.6}, 122, 20, 30, 280, "mmHg", trend={"worsening": -0.9}
    ),
    "temperature": Variable({"infiltrate": 0.7, "age": -0.5}, 37.2, 0.7, 25, 44, "degC"),
}
"""Hourly series."""

LABS = {
    "creatinine": Variable({"renal": 0.9}, 90, 0.45, 10, 2000, "umol/L", log=True, molar_mass=113.12),
    "glucose": Variable({"metabolic": 0.8}, 7, 0.35, 0.5, 80, "mmol/L", log=True, molar_mass=180.156),
    "haemoglobin": Variable({"renal": -0.4, "perfusion": -0.2}, 125, 18, 30, 230, "g/L"),
    "lactate": Variable({"perfusion": 0.9}, 1.6, 0.5, 0.2, 30, "mmol/L", log=True),
    "sodium": Variable({"metabolic": -0.6}, 139, 4, 100, 180, "mmol/L"),
    "urea": Variable({"renal": 0.8, "metabolic": 0.2}, 6, 0.5, 0.5, 100, "mmol/L", log=True),
}
"""Table."""


@dataclass(frozen=True)
class World:
    """All constants of the generator."""

    weights: tuple[float, ...] = (1.0, 0.9, 0.8, 0.9, 0.9, 0.8, 0.6, 0.4, 0.0, 0.0, 0.0)
    """Of the latents in the logit."""
    interaction: float = 0.6
    """Of infiltrate times heart: what a linear model cannot see."""
    steepness: float = 2.2
    base: float = -1.6

    latent_shift: float = 0.2
    """SD over hospitals of the latents' mean: case mix."""
    base_shift: float = 0.25
    """SD over hospitals of the intercept: base rate."""
    gain_shift: float = 0.1
    """SD over hospitals of a variable's gain: calibration of devices."""
    offset_shift: float = 0.25
    """SD over hospitals of a variable's offset, in standardised steps."""

    vitals_blur: float = 0.1
    """SD of what hides a latent from the modality, however much of it is recorded."""
    scan_blur: float = 0.1
    note_blur: float = 0.1
    labs_blur: float = 0.3

    hours: int = 12
    vitals_noise: float = 1.3
    circadian: float = 0.3
    hour_missing: float = 0.15
    """Share of single vitals never charted."""

    scan_size: int = 16
    scan_noise: float = 28.0
    """SD of a pixel, in grey levels."""
    scan_contrast: float = 28.0
    """Grey levels a standardised step."""

    labs_noise: float = 0.25
    labs_saturation: float = 1.2
    """Labs show s*tanh(z/s)."""
    lab_missing: float = 0.1

    words: tuple[int, int] = (24, 44)
    """Length of a note, from and up to."""
    topic_share: float = 0.5
    """Share of words that speak of a latent; the others are filler."""
    topic_slope: float = 2.5

    visit_share: float = 0.2
    """Share of a latent's variance that changes between the records of one patient."""
    second_record: float = 0.12
    third_record: float = 0.03

    male_perfusion: float = 0.2
    """Shift of men's perfusion latent, for the subgroups."""

    patients: tuple[int, ...] = (800, 500, 450, 400, 250, 300)
    """Patients by hospital; repeated from the start for further hospitals."""
    missing: tuple[float, ...] = (0.1, 0.15, 0.1, 0.15, 0.0, 0.35)
    """Share of a record's modalities that are missing although the hospital holds them."""
    holds: tuple[tuple[str, ...], ...] = (
        ("labs", "note", "scan", "vitals"),
        ("labs", "scan", "vitals"),
        ("note", "vitals"),
        ("labs", "note", "scan"),
        ("labs", "vitals"),
        ("note", "scan", "vitals"),
    )
    """What the hospitals hold by default."""

    def digest(self) -> str:
        """SHA-256 of every constant, variables and words included.

        >>> len(World().digest())
        64
        """
        tables = {"vitals": VITALS, "labs": LABS}
        variables = {kind: {name: asdict(card) for name, card in table.items()} for kind, table in tables.items()}
        content = {"world": asdict(self), "latents": LATENTS, "words": [FINDINGS, FILLER], **variables}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hospital_names(count: int) -> tuple[str, ...]:
    """Names of the first hospitals, in their order.

    Raises:
        UsageError: for fewer than one.
    """
    if count < 1:
        raise UsageError(f"hospitals={count} must be at least 1", remedy="The demo has 6 by default")
    return tuple(_NAMES[at] if at < len(_NAMES) else f"hospital{at + 1}" for at in range(count))
