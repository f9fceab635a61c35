"""The site file that `gapweave site init` writes."""

from __future__ import annotations

from gapweave.shared.config import Study
from gapweave.shared.config.modalities import ImageModality, ModalitySpec, PublicScore, SeriesModality, TableModality

HEAD = """# What one hospital alone decides. Every key: docs/reference.md
version: 1
name: {name}
data:
  records:                       # one row a record
    file: records.csv            # CSV (also .gz) or Parquet, relative to this file
    id: record_id                # column that identifies a record
    patient: patient_id          # column that identifies the patient
    label: {{{labels}}}          # the study's label: local column
    # where: {{ward: icu}}       # keep these rows only
"""

TAIL = """split: {{by: hash}}                # or {{column: fold}}
# subgroups: {{sex: sex}}          # for reports at the site
patients: {{declared: null, upper: 10000, max_records: 8}}
device: auto
state: state                     # ledger and private models; back it up, never copy an old one back
policy:
  epsilon: 10                    # cap over everything that this site ever releases
  delta: 1.0e-5
  min_patients: 20
  releases: [update, counts]
  unnoised: refuse
  studies: []                    # approved study hashes: `gapweave site approve` adds them
{server}
"""


SERVER = "server: {{connection: {connection}, key: {key}}}   # the hub gives the first; keep the second to yourself"


def site_template(name: str, study: Study | None, connection: str | None = None, key: str = "site.key") -> str:
    """A site file with every modality of the study, local names equal to the study's.

    Args:
        name: of the site.
        study: None writes one table as an example.
        connection: the hub's connection file; None leaves the line for later.
        key: file of the private key.
    """
    labels = ", ".join(f"{label}: {label}" for label in study.task.labels) if study else "outcome: outcome"
    if study is None:
        sources = "  labs:\n    file: labs.csv\n    columns: {sodium: sodium}   # the study's variable: local column\n"
    else:
        sources = "".join(_source(modality, study.modalities[modality]) for modality in study.order)
    server = SERVER.format(key=key, connection=connection or "connection.yaml")
    return HEAD.format(name=name, labels=labels) + sources + TAIL.format(server=server if connection else f"# {server}")


def _source(name: str, spec: ModalitySpec) -> str:
    """One modality; delete it when the hospital does not have it."""
    if isinstance(spec, PublicScore):
        return f"  # {name} is computed from the others\n"
    if isinstance(spec, ImageModality):
        return f"  {name}: {{folder: {name}, column: {name}_file}}\n"
    if isinstance(spec, SeriesModality | TableModality):
        time = (
            f"    time: hour                   # hours since the index time, below {spec.hours}\n" if spec.hours else ""
        )
        columns = "".join(f"      {variable}: {variable}\n" for variable in sorted(spec.columns))
        return f"  {name}:\n    file: {name}.csv\n{time}    columns:\n{columns}"
    return f"  {name}: {{file: {name}.csv, columns: [text]}}\n"
