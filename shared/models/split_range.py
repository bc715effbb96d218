"""Which blocks of a model live on the trunk."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.errors import SplitError


@dataclass(frozen=True)
class SplitRange:
    """Blocks ``start .. end - 1`` live on the trunk; the client keeps the rest."""

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> SplitRange:
        """Reads ``"START:END"``, as in ``"2:10"``.

        Raises:
            SplitError: If the text is not two whole numbers joined by a colon.
        """
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text)
        if match is None:
            raise SplitError(f"split {text!r} is not START:END with two whole numbers, as in 2:10")
        return cls(int(match[1]), int(match[2]))

    def check(self, num_layers: int) -> SplitRange:
        """Returns itself if a model of ``num_layers`` blocks can be split there.

        Raises:
            SplitError: If not ``0 < start < end < num_layers``. Both ends keep at least one block:
                with none below, the trunk would see bare embeddings, which name the tokens.
        """
        if not 0 < self.start < self.end < num_layers:
            raise SplitError(
                f"split {self} does not fit a model of {num_layers} blocks: "
                f"accepted is START:END with 0 < START < END < {num_layers}"
            )
        return self

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"
