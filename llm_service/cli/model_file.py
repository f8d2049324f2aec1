"""models.yaml: the models that there are to be, and what must change for that.

    models:
      - alias: pro
        provider: OPENAI_CHAT
        base_url: https://api.example.org/v1
        upstream_model: big-1
        api_key: ${BIG_API_KEY}
        active: true

The fields are those of creditmesh.llm.v1.Model; `${NAME}` stands for an environment variable. A model is told apart by
alias, provider, base_url and upstream_model; everything else can be changed in place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from creditmesh.llm.v1 import model_service_pb2
from google.protobuf import json_format

from llm_service.domain.deployment import masked_key
from llm_service.wire.models import MESSAGE_FIELDS, UPDATABLE, deployment_from_proto, deployment_to_proto
from servicekit.core.errors import DomainError

Model = model_service_pb2.Model
Identity = tuple[str, int, str, str]
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_IDENTITY = ("alias", "provider", "base_url", "upstream_model")


class ModelFileError(Exception):
    """The file does not say what models there are to be; one line for each reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, slots=True)
class Change:
    """`kind`: + a model to add, ~ one to change, - one to delete, ? one that the file does not name and that stays."""

    kind: str
    label: str
    model_id: str = ""
    wanted: Model | None = None
    fields: tuple[str, ...] = ()
    told: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        return self.kind != "?"

    def text(self) -> str:
        if self.kind == "?":
            return f"? {self.label}: not in the file, left alone (--prune deletes it)"
        return f"{self.kind} {self.label}" + "".join(f"\n    {line}" for line in self.told)


def read_model_file(text: str, environ: Mapping[str, str]) -> list[Model]:
    """As the server would keep them, keys in clear. Raises ModelFileError."""
    import yaml  # here: the server shares this command line and never reads such a file

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ModelFileError([f"is no YAML{f' (line {mark.line + 1})' if mark else ''}"]) from None
    entries = document.get("models") if isinstance(document, dict) else None
    if not isinstance(entries, list) or (isinstance(document, dict) and set(document) != {"models"}):
        raise ModelFileError(["must be a mapping with the one key `models`, a list"])
    problems: list[str] = []
    models: list[Model] = []
    seen: set[Identity] = set()
    for number, entry in enumerate(entries, start=1):
        try:
            model = _model_of(entry, environ)
        except (DomainError, json_format.ParseError, TypeError, ValueError) as error:
            problems.append(f"model {number}: {str(error).splitlines()[0][:200]}")
            continue
        if _identity(model) in seen:
            problems.append(f"model {number}: has the alias, provider, base_url and upstream_model of one before")
        seen.add(_identity(model))
        models.append(model)
    if problems:
        raise ModelFileError(problems)
    return models


def _model_of(entry: Any, environ: Mapping[str, str]) -> Model:
    if not isinstance(entry, dict):
        raise ValueError("must be a mapping")
    values = dict(_with_variables(entry, environ))
    provider = str(values.get("provider", ""))
    if provider and not provider.startswith("PROVIDER_"):
        values["provider"] = f"PROVIDER_{provider}"
    if unknown := sorted(set(values) - UPDATABLE):
        raise ValueError(f"has no field {', '.join(map(str, unknown))}")
    if missing := [name for name in ("alias", "provider", "upstream_model") if not values.get(name)]:
        raise ValueError(f"needs {', '.join(missing)}")
    model = json_format.ParseDict(values, Model())
    key = model.api_key
    model = deployment_to_proto(deployment_from_proto(model))
    model.api_key = key
    return model


def _with_variables(value: Any, environ: Mapping[str, str]) -> Any:
    def replaced(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in environ:
            raise ValueError(f"${{{name}}} is not set")
        return environ[name]

    if isinstance(value, str):
        return _VARIABLE.sub(replaced, value)
    if isinstance(value, dict):
        return {name: _with_variables(each, environ) for name, each in value.items()}
    return [_with_variables(each, environ) for each in value] if isinstance(value, list) else value


def _identity(model: Model) -> Identity:
    return model.alias, model.provider, model.base_url, model.upstream_model


def _label(model: Model) -> str:
    provider = model_service_pb2.Provider.Name(model.provider).removeprefix("PROVIDER_")
    return f"{model.alias}: {provider} {model.upstream_model} {model.base_url}".rstrip()


def changes_between(
    wanted: Sequence[Model], registered: Sequence[Model], *, prune: bool, keys: bool
) -> tuple[list[Change], int]:
    """What to do, and how many models are as they should be. `registered` have masked keys: a key counts as the same
    when its ends are, unless `keys`."""
    known: dict[Identity, list[Model]] = {}
    for model in registered:
        known.setdefault(_identity(model), []).append(model)
    changes: list[Change] = []
    unchanged = 0
    for model in wanted:
        same = known.get(_identity(model), [])
        if not same:
            changes.append(Change("+", _label(model), wanted=model))
            continue
        current = same.pop(0)
        fields = [name for name in sorted(UPDATABLE - set(_IDENTITY)) if _differs(name, model, current, keys=keys)]
        if fields:
            told = tuple(f"{name}: {_shown(name, current)} -> {_shown(name, model)}" for name in fields)
            changes.append(Change("~", _label(model), current.model_id, model, tuple(fields), told))
        else:
            unchanged += 1
    for rest in known.values():
        changes += [Change("-" if prune else "?", _label(model), model.model_id) for model in rest]
    return changes, unchanged


def _differs(name: str, wanted: Model, current: Model, *, keys: bool) -> bool:
    if name == "api_key":
        return (keys and bool(wanted.api_key)) or masked_key(wanted.api_key) != current.api_key
    if name in MESSAGE_FIELDS and wanted.HasField(name) != current.HasField(name):  # type: ignore[arg-type]  # by name
        return True
    return bool(getattr(wanted, name) != getattr(current, name))


def _shown(name: str, model: Model) -> str:
    value = getattr(model, name)
    if name == "api_key":
        return masked_key(value) if len(value) > 11 or "..." not in value else value
    if name in MESSAGE_FIELDS:
        told = json_format.MessageToDict(value, preserving_proto_field_name=True)
        return str(told) if model.HasField(name) else "nothing"  # type: ignore[arg-type]  # by name
    return str(dict(value)) if name == "extra_headers" else repr(value)
