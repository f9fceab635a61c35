"""Study files, site files, and the errors that a person gets for a wrong one."""

from gapweave.shared.config.site import Site, load_site
from gapweave.shared.config.study import Study, load_study, naming_study

__all__ = ["Site", "Study", "load_site", "load_study", "naming_study"]
