"""Which addresses of model servers may be asked, so that a registered model is no way into the inside of a network."""

from __future__ import annotations

import ipaddress
from enum import Enum
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Reach(Enum):
    """How far into private networks model servers may lie."""

    PUBLIC = "public"
    """Public addresses only."""
    LOOPBACK = "loopback"
    """And this machine's own."""
    PRIVATE = "private"
    """And private ranges: a model server in the same network."""


SHARED = ipaddress.ip_network("100.64.0.0/10")


def is_allowed(address: Address, reach: Reach) -> bool:
    """Link-local (clouds answer with credentials there), multicast, unspecified and reserved addresses never are."""
    mapped = address.ipv4_mapped or address.sixtofour if isinstance(address, ipaddress.IPv6Address) else None
    if mapped is not None:
        return is_allowed(mapped, reach)
    if address.is_loopback:
        return reach is not Reach.PUBLIC
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    if address.is_private or (address.version == 4 and address in SHARED):
        return reach is Reach.PRIVATE
    return not address.is_reserved


def problem_of_url(url: str, reach: Reach) -> str:
    """What is wrong with a base_url, as far as it tells without looking the name up; empty = nothing."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        is_address = parts.scheme in ("http", "https") and host != "" and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        return "must be an http or https address"
    if parts.username is not None or parts.query or parts.fragment:
        return "must have no user, query or fragment"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if host == "localhost" or host.endswith(".localhost"):
            return "" if reach is not Reach.PUBLIC else "lies on this machine; LLM_UPSTREAM_REACH does not allow that"
        return ""
    return "" if is_allowed(address, reach) else "lies where LLM_UPSTREAM_REACH does not allow to ask"
