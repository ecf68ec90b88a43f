"""Who leaves in the middle of a body: one line at INFO, and nothing is left of it."""

import logging
import socket
import struct
import urllib.parse

import pytest

from tests.coordinator.jobs.world import Site

PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nthe beginning'
UPLOAD = "multipart/form-data; boundary=b"
JSON = "application/json"


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("is_reset", [False, True])
def test_who_leaves_in_the_middle_of_a_body_costs_one_line(
    site: Site, caplog: pytest.LogCaptureFixture, is_chunked: bool, is_reset: bool
) -> None:
    caplog.set_level(logging.INFO)
    routes = [
        *[(f"/v1/{name}", JSON) for name in ("completions", "chat/completions", "batches")],
        *[("/tokenize", JSON), ("/detokenize", JSON), ("/v1/documents", JSON)],
        *[("/v1/documents", UPLOAD), ("/v1/files", UPLOAD)],
    ]
    address = urllib.parse.urlsplit(site.client.base_url.__str__())
    for number, (path, content_type) in enumerate(routes, 1):
        body = PART if content_type is UPLOAD else b'{"model": '
        length = "Transfer-Encoding: chunked" if is_chunked else "Content-Length: 1000"
        lines = (f"POST {path} HTTP/1.1", "Host: [::1]", f"Content-Type: {content_type}", length)
        sent = b"%x\r\n%s\r\n" % (len(body), body) if is_chunked else body
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + sent)
            if is_reset:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        site.until(lambda number=number: len(gone(caplog)) == number)
    assert all(record.levelno == logging.INFO for record in gone(caplog))
    loud = [r for r in caplog.records if r.levelno > logging.INFO or r.exc_info]
    assert not loud, [record.getMessage() for record in loud]


def gone(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if "sender has gone" in record.getMessage()]
