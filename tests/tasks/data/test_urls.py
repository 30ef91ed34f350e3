"""Images at http addresses: downloaded with limits, from a server of the tests, and then kept."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mr1_fast.config import cache_folder
from mr1_fast.errors import UserError
from mr1_fast.tasks.data import urls
from mr1_fast.tasks.data.images import ImageReader
from mr1_fast.tasks.data.urls import is_address

from ...data.pictures import colour, encoded, picture

PNG = encoded(picture(1))


class Handler(BaseHTTPRequestHandler):
    """Answers as good and bad servers do."""

    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.split("?")[0].strip("/").replace("-", "_").split("/")[0]
        getattr(self, name, self.missing)()

    def answer(self, content=b"", code=200, **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def picture(self):
        self.answer(PNG, Content_Length=len(PNG))

    def without_length(self):
        self.answer(PNG)

    def missing(self):
        self.answer(b"not found", 404)

    def page(self):
        self.answer(b"<html>Please log in</html>")

    def empty(self):
        self.answer(code=204)

    def cut(self):
        self.answer(PNG[:50], Content_Length=len(PNG))

    def too_large(self):
        self.answer(Content_Length=2**40)

    def endless(self):
        self.answer(PNG)
        while True:
            self.wfile.write(bytes(2**16))

    def nonsense(self):
        self.answer(PNG, Content_Length="many")

    def silent(self):
        self.server.done.wait(20)

    def dripping(self):
        self.answer(PNG[:20])
        while not self.server.done.wait(0.05):
            self.wfile.write(b".")

    def dripping_headers(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while not self.server.done.wait(0.05):
            self.wfile.write(b".")

    def moved(self):
        self.answer(code=302, Location="/picture?moved")

    def moved_to_file(self):
        self.answer(code=302, Location="file:///etc/passwd")

    def moved_to_ftp(self):
        self.answer(code=301, Location="ftp://127.0.0.1/a.png")

    def moved_for_ever(self):
        self.answer(code=307, Location="/moved-for-ever")

    def moved_nowhere(self):
        self.answer(code=302)

    def moved_with_an_endless_body(self):
        self.answer(code=302, Location="/picture?after")
        while True:
            self.wfile.write(bytes(2**16))

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        """A client that has gone is no error here."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("MR1_FAST_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.done = [], threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.done.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def reader(tmp_path):
    return ImageReader(tmp_path, fenced=True, allow_urls=True)


def kept():
    return sorted((cache_folder() / "images").glob("*"))


def test_nothing_is_asked_for_without_allow_urls(server, tmp_path):
    for cell in (f"{server.address}/picture", {"url": f"{server.address}/picture"}):
        with pytest.raises(UserError, match=r"image in row 1 of d .* without --allow-urls: add it"):
            ImageReader(tmp_path).read(cell, "row 1 of d")
    assert server.asked == [] and not kept()


@pytest.mark.parametrize("path", ["/picture", "/without-length", "/picture?q=a%20b&c=d#part"])
def test_an_image_is_downloaded_once(path, server, reader):
    address = server.address + path
    assert reader.header(address, "row 1") == (28, 28)
    cells = (address, {"url": address}, {"type": "image_url", "image_url": {"url": address}})
    for cell in cells:
        assert reader.read(cell, "row 1").getpixel((5, 5)) == colour(1)
    assert server.asked == [path.partition("#")[0]] and len(kept()) == 1


def test_the_cache_serves_when_the_server_is_gone(server, reader):
    reader.read(f"{server.address}/picture", "row 1")
    server.shutdown()
    server.server_close()
    assert reader.read(f"{server.address}/picture", "row 1").getpixel((5, 5)) == colour(1)
    with pytest.raises(UserError, match=r"image in row 2 cannot be downloaded .*refused"):
        reader.read(f"{server.address}/picture?other", "row 2")


def test_redirects_are_followed(server, reader):
    assert reader.header(f"{server.address}/moved", "row 1") == (28, 28)
    assert server.asked == ["/moved", "/picture?moved"]
    assert reader.header(f"{server.address}/moved-with-an-endless-body", "row 1") == (28, 28)


FAULTS = {
    "/missing": "the server answers 404",
    "/page": "not an image in one of the formats",
    "/empty": "not an image",
    "/cut": f"the server sent 50 of {len(PNG)} bytes",
    "/too-large": "more than 20 MiB",
    "/endless": "more than 20 MiB",
    "/nonsense": "invalid literal",
    "/moved-to-file": "it is redirected to file:///etc/passwd",
    "/moved-to-ftp": "it is redirected to ftp://127.0.0.1/a.png",
    "/moved-for-ever": "it is redirected more than 5 times",
    "/moved-nowhere": "the server answers 302",
}


@pytest.mark.parametrize("path, message", FAULTS.items(), ids=FAULTS)
def test_a_bad_answer_is_one_sentence_and_not_kept(path, message, server, reader):
    with pytest.raises(UserError, match=message) as raised:
        reader.read(server.address + path, "row 3 of d")
    assert f"the image in row 3 of d cannot be downloaded from {server.address}" in str(
        raised.value
    )
    assert not kept() and len(server.asked) <= 6


@pytest.mark.parametrize("path", ["/silent", "/dripping", "/dripping-headers"])
def test_a_slow_server_is_left_in_time(path, server, reader, monkeypatch):
    monkeypatch.setattr(urls, "WAIT", 0.5)
    monkeypatch.setattr(urls, "DEADLINE", 1)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"timed out|it takes more than 1 s"):
        reader.read(server.address + path, "row 1")
    assert time.monotonic() - start < 5 and not kept()


def test_a_download_that_is_left_ends_itself(server, reader, monkeypatch):
    monkeypatch.setattr(urls, "DEADLINE", 0.5)
    with pytest.raises(UserError, match="it takes more than"):
        reader.read(f"{server.address}/dripping", "row 1")
    end = time.monotonic() + 10
    while any(thread.name == "download" for thread in threading.enumerate()):
        assert time.monotonic() < end, "it still reads"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http://[::1",
        "http://127.0.0.1:port/a.png",
        "http://127.0.0.1:99999/a.png",
        "http://user:secret@127.0.0.1/a.png",
        "http://a\r\nHost: b/a.png",
        "http://\ud800/a.png",
        "http://" + "a" * 10_000_000,
    ],
)
def test_an_address_that_is_none(address, reader, server):
    with pytest.raises(UserError, match="the image in row 1 cannot be downloaded") as raised:
        reader.read(address, "row 1")
    assert len(str(raised.value)) < 400 and str(raised.value).isprintable()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_speaks_no_http(scheme, reader, server):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 mail ready\r\n")

        threading.Thread(target=talk, daemon=True).start()
        with pytest.raises(UserError, match="cannot be downloaded"):
            reader.read(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/", "row 1")


def test_many_threads_keep_one_whole_file(server, reader):
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(reader.header(f"{server.address}/picture", "row 1"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(28, 28)] * 8
    assert [file.read_bytes() for file in kept()] == [PNG]


def test_a_cache_that_cannot_be_written(server, reader, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(UserError, match="set MR1_FAST_CACHE to a folder with room"):
        reader.read(f"{server.address}/picture", "row 1")


def test_addresses():
    assert is_address("http://a") and is_address("HTTPS://a")
    assert not is_address("file:///a") and not is_address("httpx://a") and not is_address("a")
