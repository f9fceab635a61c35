"""The eICU demo as ten groups of hospitals: a study file and a site file for each.

The data are not shipped (ODbL 1.0): `gapweave data fetch eicu_demo` says where they come from. Inputs are
those of the first 24 hours; length of stay, ICU mortality and the other label are never inputs.
"""
