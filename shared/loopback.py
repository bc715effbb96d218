"""Whether an address stays on this machine."""

from __future__ import annotations

import ipaddress
import socket


def host_of(address: str) -> str:
    """The host of a ``HOST:PORT``, an IPv6 address without its brackets."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether nothing sent to a ``HOST:PORT``, or accepted there, crosses a network.

    Of names only ``localhost`` counts, and only while it stands for loopback addresses alone; any
    other name may mean something else by the time that it is looked up again.
    """
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        found = _addresses(host) if host == "localhost" else []
        return bool(found) and all(map(_is_loopback_ip, found))


def _addresses(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(entry[4][0]) for entry in found]


def _is_loopback_ip(text: str) -> bool:
    return ipaddress.ip_address(text).is_loopback
