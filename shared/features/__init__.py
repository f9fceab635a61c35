"""Public, parameter-free, deterministic transforms from a record's raw values to a model's input.

Nothing here is estimated from patients: ranges and codes come from the study file. The encoders use these
features and so do the linear and boosting baselines, so that a comparison compares models.
"""
