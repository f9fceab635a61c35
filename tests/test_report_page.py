"""The page for an ethics board after three studies on one `--state`: what headless Chromium shows of it at 1280x800,
and that its numbers are those of `privacy report --json` and `privacy verify --json`."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commandline import done

from gapweave.shared.report.ledger_text import left_figure
from gapweave.shared.report.wording import budget, short, size
from gapweave.sites.demo import write_demo

WIDTH, HEIGHT = 1280, 800
BOXES = ("Spent", "Left", "What left the site", "What is not covered")
SECTIONS = (
    *BOXES,
    "Epsilon over rounds",
    "By study",
    "Every mechanism",
    "Parameters that left, and that stayed",
    "What the guarantee means",
    "What it does not cover",
    "Audit",
    "To check this report",
)
STUDIES = (
    ("--set", "epsilon=2"),
    ("--set", "name=heads-only", "--set", "sharing.policy=heads", "--set", "epsilon=1"),
    ("--set", "name=small", "--seed", "1", "--set", "epsilon=0.3"),
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]

MEASURE = """<script>
const rect = (element) => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const shown = (element) => element.textContent.trim() && element.getClientRects().length;
const tells = [...document.querySelectorAll("h1, h2, p, li, th, td, a, caption")];
const result = {
  view: [innerWidth, innerHeight],
  width: document.documentElement.scrollWidth,
  boxes: [...document.querySelectorAll(".box")].map((box) => [box.querySelector("h2").textContent, ...rect(box)]),
  badge: rect(document.querySelector("#standing")),
  outside: [...document.querySelectorAll(".box *")].filter((element) => {
    const [left, top, right, bottom] = rect(element), box = rect(element.closest(".box"));
    return left < box[0] || top < box[1] || right > box[2] + .5 || bottom > box[3] + .5;
  }).map((element) => element.textContent),
  clipped: tells.filter((element) => element.scrollWidth > element.clientWidth + 1
    && getComputedStyle(element).display !== "inline").map((element) => element.textContent),
  wide: tells.filter((element) => rect(element)[2] > innerWidth).map((element) => element.textContent),
  sections: [...document.querySelectorAll("h2")].filter(shown).map((element) => element.textContent),
  small: tells.filter((element) => parseFloat(getComputedStyle(element).fontSize) < 12).length,
};
const out = document.createElement("pre");
out.id = "measured";
out.textContent = JSON.stringify(result);
document.body.append(out);
</script>"""


def chromium() -> str:
    """The browser, or a reason to skip."""
    found = shutil.which("chromium")
    if found is None:
        assert not os.environ.get("CI"), "CI must have chromium (packages.txt)"
        pytest.skip("chromium is not installed")
    return found


def measured(page: str, folder: Path, width: int = WIDTH) -> dict[str, Any]:
    """What the browser makes of a page, with a script added that measures it."""
    file = folder / "measured.html"
    file.write_text(page.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    where = (f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{HEIGHT}", "--dump-dom", file.as_uri())
    shown = subprocess.run(
        [chromium(), *FLAGS, *where], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=True
    )
    found = re.search(r'<pre id="measured">(.*?)</pre>', shown.stdout.decode(), re.DOTALL)
    assert found, "the page did not run its script"
    content: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return content


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's state after three studies on one `--state`."""
    folder = tmp_path_factory.mktemp("board")
    study = write_demo(folder / "demo", hospitals=2, patients=60)
    for number, options in enumerate(STUDIES):
        places = ("--out", folder / f"run{number}", "--state", folder / "hospitals")
        done("simulate", study, *places, "--rounds", 2, "--set", "training.local_steps=2", *options)
    return folder / "hospitals" / "birch"


@pytest.fixture(scope="module")
def page(state: Path) -> str:
    done("privacy", "report", state, "--out", state / "board.html")
    return (state / "board.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(state: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(done("privacy", "report", state, "--json").out)
    return content


@pytest.fixture(scope="module")
def seen(page: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(page, tmp_path_factory.mktemp("seen"))


def told(page: str, name: str) -> str:
    """Text of the element with an id."""
    found = re.search(rf'id="{name}"[^>]*>([^<]*)<', page)
    assert found, name
    return html.unescape(found.group(1))


def rows(page: str, section: str) -> list[list[str]]:
    """Cells of the body of the table under a heading."""
    table = page[page.index(f'<h2 id="{section}">') :].split("</table>")[0]
    lines = re.findall(r"<tr>(.*?)</tr>", table.split("</thead>")[1], re.DOTALL)
    return [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL)]
        for line in lines
    ]


def test_the_four_boxes_lie_in_the_first_viewport(seen: dict[str, Any]) -> None:
    width, height = seen["view"]
    assert width == WIDTH
    assert height <= HEIGHT, "the window's own frame is part of its size"
    assert tuple(box[0] for box in seen["boxes"]) == BOXES
    for name, left, top, right, bottom in seen["boxes"]:
        assert left >= 0 <= top, name
        assert right <= width, name
        assert bottom <= height, name
    assert 0 <= seen["badge"][1] < seen["badge"][3] < height


def test_nothing_is_clipped_overlaps_its_box_or_needs_scrolling_sideways(seen: dict[str, Any]) -> None:
    assert seen["width"] <= WIDTH
    assert seen["clipped"] == []
    assert seen["outside"] == []
    assert seen["wide"] == []
    assert seen["small"] == 0


def test_a_printed_page_has_every_section(page: str, tmp_path: Path) -> None:
    """A4 landscape less its margins is 1032 CSS pixels wide."""
    printed = measured(page.replace("@media print", "@media all"), tmp_path, width=1032)
    assert tuple(printed["sections"]) == SECTIONS
    assert printed["wide"] == []
    assert printed["outside"] == []


def test_the_browser_makes_a_picture_and_a_print_of_it(state: Path, page: str, tmp_path: Path) -> None:
    del page
    for option, name, start in (("--screenshot", "a.png", b"\x89PNG"), ("--print-to-pdf", "a.pdf", b"%PDF")):
        where = (f"--user-data-dir={tmp_path / 'profile'}", f"{option}={tmp_path / name}")
        address = (state / "board.html").as_uri()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([chromium(), *FLAGS, *where, address], timeout=60, check=True, **quiet)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_the_first_numbers_are_those_of_report_and_verify(state: Path, page: str, report: dict[str, Any]) -> None:
    verify = json.loads(done("privacy", "verify", state, "--json").out)
    for content in (report, verify):
        assert told(page, "spent-filter") == budget(content["epsilon_filter"])
        assert told(page, "spent-exact") == budget(content["epsilon"])
        assert told(page, "cap") == short(content["cap"])
        assert told(page, "delta") == short(content["delta"])
        assert told(page, "standing") == f"Ledger: ○ {content['intact']}"
    assert told(page, "left") == left_figure(report["left"])
    assert told(page, "planned-filter") == budget(report["reserved_filter"])
    assert told(page, "planned-exact") == budget(report["reserved"])
    text = done("privacy", "verify", state).out
    assert f"epsilon {told(page, 'spent-filter')} of a cap of {told(page, 'cap')}" in text
    assert f"epsilon {told(page, 'spent-exact')} for schedules fixed in advance" in text


def test_every_study_and_mechanism_is_as_in_the_json(page: str, report: dict[str, Any]) -> None:
    assert [study["name"] for study in report["studies"]] == ["demo", "heads-only", "small"]
    for row, study in zip(rows(page, "studies"), report["studies"], strict=True):
        figures = (study[key] for key in ("epsilon", "planned", "cumulative", "cumulative_filter"))
        assert row == [study["name"], study["first"], study["last"], "1", *map(budget, figures)]
    assert rows(page, "studies")[-1][-2:] == [budget(report["epsilon"]), budget(report["epsilon_filter"])]
    releases = [release for study in report["studies"] for release in study["releases"]]
    for row, release in zip(rows(page, "mechanisms"), releases, strict=True):
        sigma, rate, clip = (short(release[key]) for key in ("noise_multiplier", "sample_rate", "max_grad_norm"))
        counts = (str(release[key]) for key in ("times", "steps"))
        patients = "–" if release["n_hat"] is None else str(release["n_hat"])  # noqa: RUF001
        assert row[-8:] == [*counts, sigma, rate, clip, patients, str(release["sent"]), size(release["bytes"])]


def test_what_left_and_what_stayed_differ_by_study(page: str, report: dict[str, Any]) -> None:
    everything, heads, _ = (study["setting"] for study in report["studies"])
    assert everything["kept"] == []
    assert heads["shared"] == [group for group in everything["shared"] if re.match("head/|fusion", group)]
    assert sorted(heads["kept"] + heads["shared"]) == sorted(everything["shared"])
    for row, study in zip(rows(page, "groups"), report["studies"], strict=True):
        setting = study["setting"]
        lists = [", ".join(setting[key]) for key in ("modalities", "shared", "kept")]
        assert row == [study["name"], *lists[:2], lists[2] or "none"]
    sizes = [study["releases"][-1]["bytes"] for study in report["studies"]]
    assert sizes[1] < sizes[0] == sizes[2]


def test_hashes_lead_back_to_study_policy_and_ledger(page: str, report: dict[str, Any]) -> None:
    check = page[page.index('<h2 id="check">') :]
    for study in report["studies"]:
        assert study["study"] in check
        assert study["setting"]["policies"][0] in check
        assert study["setting"]["versions"][0] in check
    assert report["head"] in check


def test_the_page_can_be_read_aloud(page: str) -> None:
    assert page.count("<h1>") == 1
    assert '<html lang="en">' in page
    assert all("aria-label=" in tag for tag in re.findall(r"<svg [^>]*>|<div class=\"bar\"[^>]*>", page))
    assert all("scope=" in tag for tag in re.findall(r"<th\b[^>]*>", page))
    names = set(re.findall(r'\bid="([^"]+)"', page))
    pointed = re.findall(r'aria-labelledby="([^"]+)"|href="#([^"]+)"', page)
    assert {name for pair in pointed for name in pair if name} <= names
    assert not re.findall(r"<(?:script|link|img|iframe)\b|@import", page)
