"""Synthetic hospitals with known ground truth: real files, no patient, the true probability of every label.

    >>> from gapweave.sites.demo import hospital_names
    >>> hospital_names(3)
    ('alder', 'birch', 'cedar')

On the command line: `python -m gapweave.sites.demo --out DIR`.
"""

from gapweave.sites.demo.world import MODALITIES, World, hospital_names
from gapweave.sites.demo.write import oracle, write_demo

__all__ = ["MODALITIES", "World", "hospital_names", "oracle", "write_demo"]
