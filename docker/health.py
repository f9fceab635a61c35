"""The health check of a hospital's container: does the site's process answer, or is its next start waited for?

While a hub's proxy answers and the hub behind it does not, Flower's process ends and is started again after a growing
wait. That is no fault of the site's, and an engine that restarts unhealthy containers would only begin the wait again.
"""

import sys
from pathlib import Path

from gapweave.client.service import Deployment

site = Deployment.of(Path(sys.argv[1]))
waiting = any(process["pid"] is None for process in site.service.status()["processes"].values())
sys.exit(not (site.up() or waiting))
