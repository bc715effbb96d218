"""Where a trunk is: one address, or several of which the first that answers is taken."""

from __future__ import annotations

import re
import time

from client_service.connection import CONNECT_TIMEOUT_S, get_info, open_channel
from shared.errors import InvalidInputError, TrunkUnavailableError
from shared.pb.trunkline.v1 import trunk_pb2 as pb

_LOOK_AGAIN_S = 0.5
_ADDRESS = re.compile(r"([^\s:\[\]]+|\[[^\s\[\]]+\]):[0-9]{1,5}")
_LAST_PORT = 65535


def split_addresses(trunk: str) -> list[str]:
    """The trunks named in ``a:1,b:2``.

    Raises:
        InvalidInputError: If none is, or one is not ``HOST:PORT``.
    """
    addresses = [part.strip() for part in trunk.split(",") if part.strip()]
    if not addresses:
        raise InvalidInputError(f"{trunk!r} names no trunk: HOST:PORT[,HOST:PORT…] is accepted")
    for address in addresses:
        if not _ADDRESS.fullmatch(address) or not 0 < int(address.rpartition(":")[2]) <= _LAST_PORT:
            raise InvalidInputError(
                f"trunk {address!r}: accepted is HOST:PORT with a port from 1 to {_LAST_PORT}, an "
                f"IPv6 address in brackets"
            )
    return addresses


def checked_addresses(trunk: str) -> str:
    """Refuses trunks that cannot be reached as things are, without asking them; returns the same.

    Raises:
        InvalidInputError: If one is no address or on another host without TLS, or the files of
            ``--tls`` and ``--token-file`` are unusable.
    """
    for address in split_addresses(trunk):
        open_channel(address).close()  # which connects with its first call
    return trunk


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
