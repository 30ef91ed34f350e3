"""Images that data names by http and https addresses: downloaded with limits, and kept.

Data then decides which addresses this machine asks for. None is refused for being private, since
data on one's own server is legitimate; so `--allow-urls` is for data that is trusted this far.
A request is a plain GET without cookies or passwords.
"""

import hashlib
import http.client
import io
import string
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urljoin

from ...config import cache_folder
from ...errors import UserError, shortened
from ...files import write_bytes
from ...version import __version__
from .pixels import open_image

LARGEST = 20 * 2**20
"""The most bytes of an image."""
WAIT = 10
"""The most seconds to wait for a connection or for more of the answer."""
DEADLINE = 60
"""The most seconds for a whole download, with redirects."""
REDIRECTS = 5

_writing = threading.Lock()  # two threads of a process would write the same temporary file


def is_address(text: str) -> bool:
    """Return whether a text is an http or https address."""
    return text[:8].lower().startswith(("http://", "https://"))


def read_address(address: str, row: str) -> bytes:
    """Return the encoded image at an address, from the cache if it has been there before.

    Only what is an image is kept. Raises UserError, which names the row, if there is none.
    """
    kept = _kept(address)
    if kept.is_file():
        return kept.read_bytes()
    try:
        content = _download_in_time(address)
        open_image(io.BytesIO(content))
    except Exception as error:  # of sockets, HTTP, TLS, names, addresses and images
        reason = getattr(error, "reason", None) or error
        why = shortened(str(reason) or type(reason).__name__, 120)
        raise UserError(
            f"the image in {row} cannot be downloaded from {shortened(address)} ({why}): correct "
            "the address, or leave the row out."
        ) from error
    with _writing:
        write_bytes(kept, content, "set MR1_FAST_CACHE to a folder with room")
    return content


def _kept(address: str) -> Path:
    """Return the file of the cache for an address."""
    # A lone surrogate, which JSON can hold, has no UTF-8.
    key = hashlib.sha256(address.encode(errors="surrogatepass")).hexdigest()
    return cache_folder() / "images" / key


def _download_in_time(address: str) -> bytes:
    """Download an address, or raise TimeoutError at the deadline.

    Names are looked up, TLS is negotiated and headers are read without a limit in total. So all
    that is done in a thread, which is left to itself when the time is over.
    """
    results: list[bytes | Exception] = []
    end = time.monotonic() + DEADLINE

    def run() -> None:
        try:
            results.append(_download(address, end))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, name="download", daemon=True)
    thread.start()
    thread.join(DEADLINE)
    if not results:
        raise TimeoutError(f"it takes more than {DEADLINE} s")
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _download(address: str, end: float) -> bytes:
    """Return what is at an address, or behind its redirects."""
    for _ in range(REDIRECTS + 1):
        try:
            with _opener().open(_request(address), timeout=WAIT) as response:
                return _body(response, end)
        except HTTPError as error:
            with error:
                target = error.headers.get("Location") if 300 <= error.code < 400 else None
            if target is None:
                raise ValueError(f"the server answers {error.code} {error.reason}") from error
            address = urljoin(address, target)
        if not is_address(address):
            raise ValueError(f"it is redirected to {shortened(address, 40)}")
    raise ValueError(f"it is redirected more than {REDIRECTS} times")


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https alone, through the proxy that the environment names.

    urllib's own would also open files, and read the bodies of redirects without a limit.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _request(address: str) -> urllib.request.Request:
    """Return the request for an address, in which spaces and letters beyond ASCII are quoted."""
    quoted = quote(address.strip(), safe=string.punctuation)
    headers = {"User-Agent": f"mr1_fast/{__version__}", "Accept": "image/*"}
    return urllib.request.Request(quoted, headers=headers)


def _body(response: http.client.HTTPResponse, end: float) -> bytes:
    """Read an answer, which must be whole, not too long, and there in time."""
    expected = int(response.headers.get("Content-Length") or 0)
    too_large = ValueError(f"it has more than {LARGEST // 2**20} MiB")
    if expected > LARGEST:
        raise too_large
    content = bytearray()
    while part := response.read1(2**16):
        content += part
        if len(content) > LARGEST:
            raise too_large
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {DEADLINE} s")
    if len(content) < expected:
        raise ValueError(f"the server sent {len(content)} of {expected} bytes")
    return bytes(content)
