"""COVID-19 chest X-rays as five contributors: a study file and a site file for each.

The data are not shipped (CC BY-NC-SA 4.0, each image under its own licence): `gapweave data fetch covid_cxr`
says where they come from. A site is who contributed the case. One has no images, one has neither notes nor
ages; most records of a third have a note and no image. The data show how such a federation works: their
collectors ask that no diagnostic performance be claimed from them.
"""
