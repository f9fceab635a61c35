"""Recipes: a way of training under one word, `--set recipe=small` or `--vary recipe=none,small`.

Each was chosen on the development splits of one cohort and then measured as it is on others (docs/results.md); what
each part is worth: docs/decisions/0021 and 0022. What a study says of its data, its outcome and its budget stays.
"""

from __future__ import annotations

from typing import Any

_PLAIN_STEPS: dict[str, Any] = {
    "model.imputer": "none",
    "model.imputer_settings": {},
    "training.schedule": "fedsgd",
    "training.lr": 1,
    "training.local_steps": 1,
    "training.passes": None,
    "training.momentum": 0,
    "training.proximal": 0,
    "training.scaffold": False,
    "training.ridge": 0.05,
}
"""One gradient a round, of which the server knows the noise, whatever the study has."""

RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "small": {
        **_PLAIN_STEPS,
        "model.linear_path": True,
        "model.feature_norm": None,
        "scheme.settings.hide_features": 0.5,
        "scheme.settings.vote_weight": 6,
        "training.rounds": 40,
        "aggregation.server_optimizer": "adam",
        "aggregation.server_lr": 0.02,
        "aggregation.server_floor": 1e-6,
        "aggregation.average_last": 0.5,
        "aggregation.shrink": False,
    },
    "linear": {
        **_PLAIN_STEPS,
        "model.linear_path": True,
        "model.feature_norm": 10,
        "model.embedding": 2,
        "modalities.*.encoder": "none",
        "scheme.settings.vote_weight": 0,
        "training.rounds": 20,
        "training.finetune_steps": 5,  # each takes budget from the rounds
        "aggregation.server_optimizer": "none",  # robust rules see histories, which are a momentum already
        "aggregation.server_lr": 5,
        "aggregation.average_last": 0.5,
        "aggregation.shrink": True,
        "privacy.max_grad_norm": 0.7,
    },
}
"""By name.

none: the study as it is. small: some hundred patients a site, without privacy: all features, a network beside a linear
path, one gradient of all patients a round. linear: the same under noise; a linear model, which noise harms least, less
what may be noise of it. `*` stands for each modality that is no public score.
"""
