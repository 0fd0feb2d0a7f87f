"""Fetching a picture from a public address, where the server's operator allows it.

A request must not make the server speak to its own network: every name is resolved once, the address is judged, and the
connection goes to that very address; redirects are followed here, each judged anew. No proxy, no cookies, no login.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urljoin, urlsplit

REDIRECTS = 3
SECONDS = 15.0  # for all of it
WITH_IPV4_INSIDE = [ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


class RemoteError(Exception):
    """An address that is not fetched, or that gives nothing to use."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    found = ipaddress.ip_address(address.split("%")[0])
    if found.version == 6 and (found.ipv4_mapped or any(found in network for network in WITH_IPV4_INSIDE)):
        return False  # an IPv4 address in other clothes
    if found.version == 6 and found.is_site_local:  # fec0::/10, which Python takes for global
        return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def public_address(host: str, port: int) -> str:
    """The IP address to connect to. Raises RemoteError where any address of the host is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise RemoteError(f"the host {host!r} is not known") from None
    addresses = [entry[4][0] for entry in found]
    if not all(is_public(address) for address in addresses):
        raise RemoteError(f"the host {host!r} is not on the public internet")
    return addresses[0]


class _Plain(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = self.opened = _connect(self)


class _Encrypted(http.client.HTTPSConnection):
    def connect(self) -> None:
        self.opened = _connect(self)
        self.sock = self.opened = ssl.create_default_context().wrap_socket(self.opened, server_hostname=self.host)


def _connect(connection: http.client.HTTPConnection) -> socket.socket:
    address = public_address(connection.host, connection.port)
    return socket.create_connection((address, connection.port), connection.timeout)


CONNECTIONS = {"http": _Plain, "https": _Encrypted}


def fetch(url: str, max_bytes: int) -> bytes:
    """The bytes at an address.

    Raises RemoteError for other schemes, hosts that are not public (also after a redirect), too many redirects,
        answers other than 200, more than `max_bytes`, and more than SECONDS.
    """
    until = time.monotonic() + SECONDS
    for _ in range(1 + REDIRECTS):
        try:
            answer = _get(url, max_bytes, until)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise RemoteError(f"the address could not be fetched ({type(error).__name__})") from None
        if isinstance(answer, bytes):
            return answer
        url = answer
    raise RemoteError(f"more than {REDIRECTS} redirects")


def _get(url: str, max_bytes: int, until: float) -> bytes | str:
    """What is at the address, or where it is said to be instead."""
    parts = urlsplit(url)
    if parts.scheme not in CONNECTIONS or not parts.hostname:
        raise RemoteError("only http and https addresses are fetched")
    connection = CONNECTIONS[parts.scheme](parts.hostname, parts.port, timeout=_left(until))
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with _ended(connection, _left(until)):
        connection.connect()
        _left(until)  # while the name was looked up there was nothing to cut off
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "dualtoken"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return urljoin(url, response.getheader("Location") or "")
        if response.status != 200:
            raise RemoteError(f"the address answers with status {response.status}")
        data = response.read(max_bytes + 1)
        _left(until)  # what was cut off is no picture
    if len(data) > max_bytes:
        raise RemoteError(f"the file has more than {max_bytes} bytes")
    return data


@contextmanager
def _ended(connection: http.client.HTTPConnection, seconds: float) -> Iterator[None]:
    """Close the connection afterwards, and cut it off after `seconds`: a server may send byte by byte."""

    def cut() -> None:
        with suppress(AttributeError, OSError):  # not connected yet, or closed already
            connection.opened.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        connection.close()


def _left(until: float) -> float:
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise RemoteError(f"the address took longer than {SECONDS:g} s")
    return seconds
