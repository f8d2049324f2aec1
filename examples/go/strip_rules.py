"""Takes the buf.validate options out of copies of the protos: strip_rules.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path


def strip(text: str) -> str:
    """Options stand in brackets after a field, or in `option (buf...)` statements; braces within may nest."""
    out, index = [], 0
    while index < len(text):
        if text.startswith("[(buf.", index):
            depth = 0
            quoted = False
            while True:
                letter = text[index]
                if letter == '"' and text[index - 1] != "\\":
                    quoted = not quoted
                if not quoted:
                    depth += (letter == "[") - (letter == "]")
                index += 1
                if depth == 0:
                    break
            continue
        if text.startswith("option (buf.", index):
            depth, quoted = 0, False
            while not (text[index] == ";" and depth == 0 and not quoted):
                letter = text[index]
                if letter == '"' and text[index - 1] != "\\":
                    quoted = not quoted
                if not quoted:
                    depth += (letter == "{") - (letter == "}")
                index += 1
            index += 1
            continue
        out.append(text[index])
        index += 1
    return "".join(out).replace('import "buf/validate/validate.proto";\n', "")


for path in Path(sys.argv[1]).rglob("*.proto"):
    path.write_text(strip(path.read_text()))
