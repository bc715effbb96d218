"""The libraries that both ends compute with, and which of their versions go together."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import version

from shared.errors import ModelMismatchError

# PEFT builds the same adapter, and transformers the same blocks, within a minor version alone.
_SAME_MINOR = ("peft", "transformers")
_TOLD = "torch"


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Those installed here, by package."""
    return {name: version(name) for name in (*_SAME_MINOR, _TOLD)}


def check_versions(client: Mapping[str, str], trunk: Mapping[str, str]) -> str:
    """Refuses two ends whose libraries build other models.

    Args:
        client: As :func:`library_versions` gives them at the client.
        trunk: The same at the trunk.

    Returns:
        What a user should know where the rounding may differ; else nothing.

    Raises:
        ModelMismatchError: Names the package with both versions, and what is accepted.
    """
    for name in _SAME_MINOR:
        ours, theirs = client.get(name, ""), trunk.get(name, "")
        if _minor(ours) != _minor(theirs):
            raise ModelMismatchError(
                f"the client has {name} {_said(ours)}, the trunk {_said(theirs)}: accepted is the "
                f"same minor version on both"
            )
    # What stands behind a plus is how it was built, such as +cpu.
    ours, theirs = (end.get(_TOLD, "").partition("+")[0] for end in (client, trunk))
    if ours == theirs:
        return ""
    return (
        f"the client has {_TOLD} {_said(ours)}, the trunk {_said(theirs)}: last bits may differ "
        f"from those of one machine"
    )


def _minor(given: str) -> list[str]:
    return given.split(".")[:2]


def _said(given: str) -> str:
    # Another's words: no more of them than a version has.
    return repr(given[:40]) if given else "of no known version"
