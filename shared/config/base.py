"""Reading YAML files into frozen pydantic models, with errors a person can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gapweave.shared.errors import UsageError

Name = r"^[a-z][a-z0-9_]*$"
"""Pattern of the names of modalities and variables: they become file names and parameter groups."""
SiteName = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
"""Pattern of the names of sites and hubs: they become file names and keys of a checkpoint."""


class StrictModel(BaseModel):
    """A frozen model whose unknown keys are errors that name the nearest known key."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in data:
            if key not in known and not cls.accepts_key(str(key)):
                raise PydanticCustomError("unknown_key", "{text}", {"text": unknown_key(str(key), known)})
            if isinstance(data[key], bool) and key in _numbers(cls):
                text = f"{key} is a number, not true or false"  # which pydantic takes for 1 and 0
                raise PydanticCustomError("unknown_key", "{text}", {"text": text})
        return data

    @classmethod
    def accepts_key(cls, key: str) -> bool:
        """Whether a key that is no field may appear (patterns of parameter groups, say)."""
        return False


@cache
def _numbers(model: type[BaseModel]) -> frozenset[str]:
    """Fields that are a number, or may be beside None."""
    kinds = {name: set(get_args(of.annotation) or (of.annotation,)) for name, of in model.model_fields.items()}
    return frozenset(name for name, of in kinds.items() if of - {type(None)} <= {int, float})


class NoSettings(StrictModel):
    """A registered part without settings."""


def unknown_key(key: str, known: list[str], what: str = "key") -> str:
    """The message for a key (or another name) that nobody knows, naming the nearest one that somebody does."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}" if close else f"known {what}s: {', '.join(known)}"
    return f"unknown {what} {key!r}; {hint}"


def nearest(name: str, known: Collection[str]) -> str:
    """The remedy for a name that nobody knows: the nearest that somebody does, and all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"{f'Did you mean {close[0]!r}? ' if close else ''}Known: {', '.join(known)}"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, which also refuses a key given twice (it would silently keep the last).

    In C where PyYAML was built so: ten times as fast. As in YAML 1.2 only true and false are booleans: yes, no, on and
    off stay text (the codes of many a column).
    """


_BOOLEAN = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key is no list or mapping", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value
    }


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


KINDS = {"study": {"task", "modalities"}, "site": {"name", "data"}, "connection": {"host", "ca"}}
"""Files that are taken for each other, and keys that tell which one it is."""


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        path: the file.
        what: "study" or "site", for messages.

    Raises:
        UsageError: when the file is missing, not UTF-8, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UsageError(f"there is no {what} file {path}", remedy="Check the path") from None
    except OSError as error:
        raise UsageError(
            f"the {what} file cannot be read ({error.strerror})", where=str(path), remedy="Check the path"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"the {what} file is not UTF-8 text", where=str(path), remedy="Save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UsageError(f"not valid YAML: {problem}", where=f"{path}{line}", remedy="Correct that line") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"a {what} file is a mapping of keys to values",
            where=str(path),
            remedy=f"See `gapweave {what} init`",
        )
    for kind, keys in KINDS.items():
        if what in KINDS and kind != what and keys <= content.keys() and not KINDS[what] <= content.keys():
            raise UsageError(
                f"this is a {kind} file, not a {what} file", where=str(path), remedy=f"Give the {what} file here"
            )
    return content


Model = TypeVar("Model", bound=StrictModel)


def parse(model: type[Model], content: dict[str, Any], where: str) -> Model:
    """Validate ``content``, turning pydantic's report into one line.

    Raises:
        UsageError: naming file, key, what was found, and what is allowed.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise explain(error, content, where) from None


def explain(error: ValidationError, content: dict[str, Any], where: str) -> UsageError:
    """One line for the first problem of a pydantic report, with the number of further ones."""
    problems = error.errors(include_url=False)
    paths = [list(_written(problem["loc"], content, absent=problem["type"] == "missing")) for problem in problems]
    # Where one of several forms is allowed, each reports: the one that looked deepest is the form that was meant.
    same = [at for at, path in enumerate(paths) if at == 0 or (paths[0] and path[: len(paths[0])] == paths[0])]
    chosen = max(same, key=lambda at: len(paths[at]))
    first, key = problems[chosen], ".".join(paths[chosen])
    text, found = first["msg"].removeprefix("Value error, "), first.get("ctx", {})
    if first["type"] == "missing":
        text = "this key is required"
    elif first["type"] == "union_tag_not_found":
        text = f"the key {found['discriminator']} is required"
    elif first["type"] == "union_tag_invalid":
        known = re.findall(r"'([^']*)'", found["expected_tags"])
        key, text = f"{key}.{found['discriminator'].strip(chr(39))}", unknown_key(str(found["tag"]), known, "kind")
    elif first["type"] not in ("unknown_key", "value_error") and not isinstance(first["input"], dict | list):
        text = f"{text}, found {first['input']!r}"
    others = len(problems) - len(same)
    more = f" (and {others} more)" if others else ""
    return UsageError(f"{text}{more}", where=f"{where}:{key}" if key else where, remedy="Correct that key")


def _written(loc: tuple[int | str, ...], content: Any, *, absent: bool) -> Iterator[str]:
    """The parts of a pydantic location that stand in the file: tags of unions and keys of our own do not.

    Args:
        loc: the location.
        content: what was read from the file.
        absent: whether the last part is a key that the file lacks.
    """
    for at, part in enumerate(loc):
        inside = part in content if isinstance(content, dict) else isinstance(content, list) and isinstance(part, int)
        if inside:
            content = content[part]
            yield str(part)
        elif absent and at == len(loc) - 1:
            yield str(part)
