"""Words of the synthetic notes."""

FINDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "heart": (
        ("orthopnoea", "oedema", "gallop", "cardiomegaly", "distended", "diuretics", "ejection", "crackles",
         "congested", "palpitations", "fibrillation", "troponin", "diuretic", "swollen", "dyspnoea", "rales"),
        ("euvolaemic", "regular", "sinus", "compensated", "flat", "ambulating", "exercise", "clear",
         "unlimited", "normotensive", "slim", "echo", "cycling", "climbs", "painless", "warm"),
    ),
    "renal": (
        ("oliguria", "dialysis", "uraemic", "catheter", "anuric", "nephrology", "fistula", "effusion",
         "overloaded", "potassium", "acidotic", "haematuria", "obstructed", "retention", "itching", "urea"),
        ("voiding", "diuresing", "hydrated", "continent", "balanced", "drinking", "urinating", "even",
         "dipstick", "concentrated", "moist", "output", "fluids", "thirst", "tolerating", "soft"),
    ),
    "frailty": (
        ("bedbound", "cachectic", "falls", "dementia", "pressure", "carer", "confused", "weakness",
         "hoist", "nursing", "incontinent", "delirium", "frail", "unsteady", "malnourished", "wheelchair"),
        ("independent", "alert", "walks", "oriented", "lives", "active", "steady", "cooperative",
         "works", "drives", "gardening", "stairs", "eating", "mobile", "bright", "sleeping"),
    ),
}  # fmt: skip
"""Latent -> words that grow likelier when it is high, and when it is low."""

FILLER: tuple[str, ...] = (
    "patient", "admitted", "seen", "reviewed", "today", "history", "of", "with", "and", "the", "on", "noted",
    "family", "discussed", "plan", "continue", "monitor", "morning", "ward", "round", "reports", "denies",
    "since", "yesterday", "medication", "chart", "exam", "team", "referred", "follow",
)  # fmt: skip
"""Words that say nothing."""
