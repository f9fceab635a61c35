"""docs/reference.md, generated from the models of study and site files (`make docs`)."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gapweave.shared.config import library
from gapweave.shared.config.overrides import ALIASES, PRESETS
from gapweave.shared.config.site import Site
from gapweave.shared.config.study import Study
from gapweave.shared.registry import Registry

HEAD = """# Reference: study and site files

Generated from the code (`make docs`); a test keeps it current. Unknown keys are errors that name the nearest known one.
"""


CARDS = """For adults. `low` and `high`, `center` and `scale` are Gapweave's own; the source is that of `normal`.
"""

SCORES = """Written as `score:`, with `variables:` from the score's to the study's. Bands are of whole units: 61-70 is
from 61 to below 71. A missing variable scores 0.
"""


def markdown() -> str:
    """The whole page."""
    aliases = "\n".join(f"| `{alias}` | `{path}` |" for alias, path in ALIASES.items())
    presets = "\n".join(
        f"| `{word}={name}` | {', '.join(f'`{key}={value}`' for key, value in preset.items()) or 'nothing'} |"
        for word, named in PRESETS.items()
        for name, preset in named.items()
    )
    return "\n".join(
        [
            HEAD,
            "## The study file: what all sites agree on\n",
            *_sections(Study, ""),
            "## The site file: what one hospital alone decides\n",
            *_sections(Site, ""),
            "## Range cards\n",
            CARDS,
            f"{_cards()}\n",
            "## Published scores\n",
            SCORES,
            f"{_scores()}\n",
            "## Short names for `--set` and `--vary`\n",
            f"| short | path in the study file |\n|---|---|\n{aliases}\n{presets}\n",
            "## Registered names\n",
            "Those that are installed with Gapweave; the entry point group `gapweave.plugins` adds others.\n",
            f"| key | names |\n|---|---|\n{_registered()}\n",
        ]
    )


def _cards() -> str:
    rows = ["| card | unit | low | high | center | scale | normal | source |", "|---" * 8 + "|"]
    for name, card in library.cards().items():
        normal = card.get("normal")
        interval = f"{normal[0]:g} - {normal[1]:g} | {card['source']}" if normal else "|"
        spread = f"{card['scale']:g}{' (log)' if card.get('log') else ''}"
        numbers = " | ".join(f"{card[key]:g}" for key in ("low", "high", "center"))
        rows.append(f"| `{name}` | {card.get('unit', '')} | {numbers} | {spread} | {interval} |")
    return "\n".join([*rows, "", *(f"- {name}: {text}" for name, text in library.sources().items())])


def _scores() -> str:
    rows = ["| score | source | variables |", "|---|---|---|"]
    for name, score in library.scores().items():
        variables = "; ".join(f"`{variable}`: {meaning}" for variable, meaning in score["means"].items())
        rows.append(f"| `{name}` | {score['source']} | {variables} |")
    return "\n".join(rows)


def _registered() -> str:
    from gapweave.shared.encoders import ENCODERS
    from gapweave.shared.fusion import FUSIONS
    from gapweave.shared.imputers import IMPUTERS
    from gapweave.shared.schemes import SCHEMES

    registries: dict[str, Registry[Any]] = {
        "modalities.<name>.encoder": ENCODERS,
        "model.fusion": FUSIONS,
        "model.imputer": IMPUTERS,
        "scheme.name": SCHEMES,
    }
    return "\n".join(f"| `{key}` | {', '.join(f'`{name}`' for name in names)} |" for key, names in registries.items())


def _sections(model: type[BaseModel], path: str) -> Iterator[str]:
    """A table for a model, then one for each model that its keys hold."""
    title = f"### `{path}`" if path else "### Top level"
    rows = "\n".join(_row(name, field) for name, field in model.model_fields.items())
    summary = (model.__doc__ or "").strip().splitlines()[0]
    yield f"{title}\n\n{summary}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{rows}\n"
    for name, field in model.model_fields.items():
        for inner, suffix in _models(field.annotation):
            yield from _sections(inner, f"{path}.{name}{suffix}".lstrip("."))


def _row(name: str, field: FieldInfo) -> str:
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {meaning} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) or value is PydanticUndefined:
        return "see below"
    return f"`{json.dumps(value)}`"


def _unwrap(annotation: Any) -> Any:
    return _unwrap(get_args(annotation)[0]) if get_origin(annotation) is typing.Annotated else annotation


def _models(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Models inside an annotation, with what is added to the path for each."""
    annotation = _unwrap(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        yield from ((model, f".<name>{suffix}") for model, suffix in _models(arguments[1]))
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from ((model, f" ({model.__name__})") for model, _ in _models(argument))


def _type(annotation: Any) -> str:
    annotation = _unwrap(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(argument) for argument in arguments))
    if origin is dict:
        return f"map of {_type(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any"}
    return names.get(annotation, "a block")


if __name__ == "__main__":
    print(markdown())
