"""A page of docs/ that several benchmarks write, each its own section."""

from __future__ import annotations

from pathlib import Path

TITLE = "# Results\n"


def write_section(name: str, text: str, file: Path) -> None:
    """Replace what stands between the section's markers; a section that the page lacks is added at its end.

    Args:
        name: of the section.
        text: without markers.
        file: the page; a new one gets a title.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = file.read_text(encoding="utf-8") if file.exists() else TITLE
    section = f"{first}\n{text.strip()}\n{last}"
    if first in page:
        before, rest = page.split(first, 1)
        page = before + section + rest.split(last, 1)[1]
    else:
        page = f"{page.rstrip()}\n\n{section}\n"
    file.write_text(page, encoding="utf-8")
