"""Templates of the pages."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gapweave.shared.report import wording
from gapweave.shared.report.guarantee import NOT_COVERED, release_words


def render(template: str, **content: Any) -> str:
    """Fill a template of this package; every value is escaped unless it is `Markup`.

    Args:
        template: file name.
        content: variables of the template.
    """
    environment = Environment(
        loader=PackageLoader("gapweave.shared.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "signed", "size", "duration", "budget", "short"):
        environment.filters[name] = getattr(wording, name)
    environment.filters["words"] = release_words
    environment.globals["not_covered"] = NOT_COVERED
    return environment.get_template(template).render(**content)
