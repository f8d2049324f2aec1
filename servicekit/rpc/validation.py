"""The rules in the proto files, checked before any handler runs."""

from __future__ import annotations

from typing import Any

import protovalidate
from google.protobuf.message import Message

from servicekit.core.errors import FieldViolation, InvalidField
from servicekit.rpc.status import MOST_VIOLATIONS


def _path_of(violation: Any) -> str:
    path = ""
    for element in violation.proto.field.elements if violation.proto.field else ():
        path += f".{element.field_name}" if path else element.field_name
        subscript = element.subscript
        if subscript is not None and subscript.value is not None:
            path += f"[{subscript.value}]"
    return path


class RequestValidator:
    """Checks messages by their protovalidate rules; one per process, it compiles each message's rules once."""

    def __init__(self) -> None:
        self._validator = protovalidate.Validator()

    def check(self, message: Message) -> None:
        """Raises InvalidField that names every violation."""
        try:
            self._validator.validate(message)
        except protovalidate.ValidationError as error:
            violations = [
                FieldViolation(_path_of(violation), violation.proto.message or "is not valid")
                for violation in error.violations[:MOST_VIOLATIONS]
            ]
            text = "; ".join(f"{violation.field or 'request'}: {violation.description}" for violation in violations[:5])
            raise InvalidField(text, violations=violations) from None
