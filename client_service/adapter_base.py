"""What an adapter was trained on, noted beside it: another base gives another model, silently."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from client_service.session import TrunkSession
from shared.pb.trunkline.v1 import trunk_pb2 as pb

logger = logging.getLogger(__name__)

BASE_FILE = "trunkline_base.json"


def note_base(folder: str | os.PathLike[str], session: TrunkSession) -> None:
    """Writes which weights of the trunk an adapter belongs to, beside what PEFT wrote."""
    path = Path(folder) / BASE_FILE
    path.write_text(json.dumps(_base(session.info), indent=2) + "\n", encoding="utf-8")


def tell_other_base(folder: str | os.PathLike[str], info: pb.GetInfoResponse) -> None:
    """Says so, with both, if an adapter was trained on another base than a trunk serves."""
    path = Path(folder) / BASE_FILE
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # it was not made here
    except (OSError, ValueError) as error:
        logger.warning("%s: not readable (%s)", path, error)
        return
    served = _base(info)
    if noted.get("split") != served["split"]:
        noted.pop("weight_digest", None)  # of other blocks
    differing = [key for key in ("weight_digest", "quantization") if key in noted]
    for key in (key for key in differing if noted[key] != served[key]):
        logger.warning(
            "%s was trained on a base with %s %r, this trunk's is %r",
            *(folder, key, noted[key], served[key]),
        )


def _base(info: pb.GetInfoResponse) -> dict[str, str]:
    return {
        "split": f"{info.start_layer}:{info.end_layer}",
        "weight_digest": info.weight_digest,
        "quantization": info.quantization,
    }
