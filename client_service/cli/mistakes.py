"""What was wrong with a command line, in one line: what was given, and what is accepted."""

from __future__ import annotations

import shlex
from typing import Any

import typer
from pydantic import ValidationError


def in_one_line(error: BaseException) -> str:
    """The whole message of an error without its line breaks."""
    said = describe(error) if isinstance(error, typer.TyperException) else str(error)
    return " ".join(line.strip() for line in said.splitlines()) or type(error).__name__


def describe(error: typer.TyperException) -> str:
    """What typer found, with the value that was given, which typer leaves out."""
    param: Any = getattr(error, "param", None)
    if param is not None and isinstance(error.__cause__, ValidationError):
        found = error.__cause__.errors()[0]
        name = param.opts[0] if param.opts[0].startswith("-") else param.name.upper()
        said = _accepted(param.type_descriptor) or found["msg"].removeprefix("Value error, ")
        return f"{name} {shlex.quote(str(found['input']))}: {said}"
    context: Any = getattr(error, "ctx", None)
    where = f"; see {context.command_path} --help" if context is not None else ""
    return error.format_message().rstrip(".") + where


def _accepted(kind: Any) -> str:
    """What typer's description of an option's type accepts; empty where that is for others."""
    if kind.choices is not None:
        return f"accepted: {', '.join(map(str, kind.choices))}"
    if kind.annotation not in (int, float) or kind.parameter_info.parser is not None:
        return ""
    what = "a whole number" if kind.annotation is int else "a number"
    least, most = kind.parameter_info.min, kind.parameter_info.max
    if most is None:
        return f"accepted is {what}" + ("" if least is None else f" of at least {least}")
    return f"accepted is {what} from {least} to {most}"
