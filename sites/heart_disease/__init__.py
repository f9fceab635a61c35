"""UCI Heart Disease as four hospitals: a study file and a site file for each.

The data are not shipped (CC BY 4.0): `gapweave data fetch heart_disease` says where they come from. The four
blocks of columns are the modalities: a hospital that did not take a test lacks the whole block.
"""
