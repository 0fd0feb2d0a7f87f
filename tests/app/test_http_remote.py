"""Fetching addresses: never from a private network, also not by way of a redirect."""

import http.server
import threading
import time

import pytest

from dualtoken.app import http_remote
from dualtoken.app.http_remote import RemoteError, fetch, is_public


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
            return
        inside = f"http://127.0.0.2:{self.server.server_port}/x"
        places = {"/inside": inside, "/file": "file:///etc/passwd", "/round": "/round"}
        self.send_response(302 if self.path in places else 200 if self.path == "/x" else 404)
        if self.path in places:
            self.send_header("Location", places[self.path])
        self.end_headers()
        if self.path == "/x":
            self.wfile.write(b"a picture")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address(monkeypatch):
    """A server whose address, 127.0.0.1, counts as public; 127.0.0.2 does not."""
    real = is_public
    monkeypatch.setattr(http_remote, "is_public", lambda a: a == "127.0.0.1" or real(a))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_is_public():
    assert is_public("8.8.8.8") and is_public("2606:4700:4700::1111")
    for private in (
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "::1", "::ffff:127.0.0.1", "fe80::1%eth0", "fd00::1", "64:ff9b::7f00:1", "2002:7f00:1::", "fec0::1",
        "255.255.255.255",
    ):  # fmt: skip
        assert not is_public(private), private


def test_only_public_hosts_are_fetched(address):
    assert fetch(f"{address}/x", 100) == b"a picture"
    for path, words in (
        ("/inside", "not on the public internet"),
        ("/file", "only http and https"),
        ("/round", "redirects"),
        ("/nowhere", "status 404"),
    ):
        with pytest.raises(RemoteError, match=words):
            fetch(address + path, 100)
    with pytest.raises(RemoteError, match="more than 4 bytes"):
        fetch(f"{address}/x", 4)


@pytest.mark.parametrize(
    "url", ["http://[::1]:1/x", "http://localhost:1/x", "http://2130706433/x", "https://169.254.169.254/meta-data"]
)
def test_private_hosts_by_any_name(url):
    with pytest.raises(RemoteError, match=r"not on the public internet|not known"):
        fetch(url, 100)


def test_a_slow_server_is_cut_off(address, monkeypatch):
    monkeypatch.setattr(http_remote, "SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"longer than 0\.3 s"):
        fetch(f"{address}/slow", 100)
    assert time.monotonic() - started < 1.8
