"""Where a trunk is: one address, or several of which the first that answers is taken."""

from __future__ import annotations

import time

from client_service.connection import CONNECT_TIMEOUT_S, get_info, open_channel
from shared.errors import InvalidInputError, TrunkUnavailableError
from shared.pb.trunkline.v1 import trunk_pb2 as pb

_LOOK_AGAIN_S = 0.5


def split_addresses(trunk: str) -> list[str]:
    """The trunks named in ``a:1,b:2``.

    Raises:
        InvalidInputError: If none is.
    """
    addresses = [part.strip() for part in trunk.split(",") if part.strip()]
    if not addresses:
        raise InvalidInputError(f"{trunk!r} names no trunk: HOST:PORT[,HOST:PORT…] is accepted")
    return addresses


def wait_for_trunk(trunk: str, timeout_s: float = 0.0) -> pb.GetInfoResponse:
    """Returns what the first of the trunks to answer serves.

    Args:
        trunk: ``HOST:PORT``, or several with commas.
        timeout_s: How long to ask again; each is asked once at least.

    Raises:
        TrunkUnavailableError: If none answers in that time; names the last one's cause.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        for address in split_addresses(trunk):
            try:
                with open_channel(address) as channel:
                    return get_info(channel, address, CONNECT_TIMEOUT_S)
            except TrunkUnavailableError as error:
                missing = error
        if time.monotonic() > deadline:
            raise missing
        time.sleep(_LOOK_AGAIN_S)
