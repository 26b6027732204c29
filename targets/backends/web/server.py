"""A page on the loopback interface that runs a model, and the browser that shows it.

The page asks for work (``job``) and brings results (``reply``); this process never calls into the browser. All paths
begin with a secret, so that other pages of the browser cannot take part. ``Cross-Origin-*-Policy`` headers isolate the
page: without that a browser gives WebAssembly neither threads nor a clock finer than 0.1 ms.
"""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from compressor.errors import RunError
from compressor.types import Array
from targets.messages import decode, encode

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    "--disable-background-timer-throttling",
)
_KINDS = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
_WAIT_S = 20.0  # how long the page's question for work is held open
_LARGEST_REPLY = 2**31


def find_browser() -> str | None:
    """A Chromium on the PATH."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Page:
    """Files the page may fetch by name, work for it, and what it brings back."""

    def __init__(self, files: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
        self.files = dict(files)
        self.settings = json.dumps(dict(settings)).encode()
        self.jobs: queue.Queue[bytes] = queue.Queue()
        self.replies: queue.Queue[bytes] = queue.Queue()
        self.secret = secrets.token_urlsafe(16)
        self.closed = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    """Serves one page; :func:`_handler` binds it to that."""

    page: Page
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def _name(self) -> str | None:
        """What is asked for, without the secret; None when the secret is wrong."""
        _, secret, name = [*self.path.split("?")[0].split("/", 2), ""][:3]
        return name if secrets.compare_digest(secret, self.page.secret) else None

    def _send(self, status: int, body: bytes = b"", kind: str = "application/octet-stream") -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the browser was closed meanwhile
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(body)

    def do_GET(self) -> None:
        name = self._name()
        if name == "settings.json":
            self._send(200, self.page.settings, "application/json")
        elif name == "job":
            self._job()
        elif name in self.page.files:
            path = self.page.files[name]
            self._send(200, path.read_bytes(), _KINDS.get(path.suffix, "application/octet-stream"))
        else:
            self._send(404)

    def _job(self) -> None:
        if self.page.closed.is_set():
            self._send(410)
            return
        try:
            self._send(200, self.page.jobs.get(timeout=_WAIT_S))
        except queue.Empty:
            self._send(204)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        if self._name() != "reply" or not 0 < size < _LARGEST_REPLY:
            self._send(404)
            return
        self.page.replies.put(self.rfile.read(size))
        self._send(200)


def _handler(page: Page) -> type[BaseHTTPRequestHandler]:
    return type("PageHandler", (_Handler,), {"page": page})


class Browser:
    """A headless browser on the page; :meth:`ask` is one job and its reply."""

    def __init__(self, page: Page, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        self._page, self._process, self._timeout_s = page, process, timeout_s

    def ask(self, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
        """Raises :class:`RunError` when the page says no, is too slow, or the browser ended."""
        self._page.jobs.put(encode(header, arrays))
        return self.wait("run the model in the browser")

    def wait(self, doing: str) -> tuple[dict[str, Any], dict[str, Array]]:
        """The next reply."""
        left = self._timeout_s
        while left > 0:
            with contextlib.suppress(queue.Empty):
                header, arrays = decode(self._page.replies.get(timeout=min(left, 1.0)))
                if not header.pop("ok"):
                    raise RunError(f"could not {doing}: {header.get('error', 'no reason given')}")
                return header, arrays
            if self._process.poll() is not None:
                raise RunError(f"could not {doing}: the browser ended with code {self._process.returncode}")
            left -= 1.0
        raise RunError(f"could not {doing} within {self._timeout_s:g} s", hint="Raise `options.timeout_s`.")


@contextmanager
def browse(executable: str, page: Page, timeout_s: float) -> Iterator[Browser]:
    """Serve the page and show it in a headless browser, until the context ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(page))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}/{page.secret}/index.html"
    with tempfile.TemporaryDirectory(prefix="compress-web-", ignore_cleanup_errors=True) as profile:
        command = [executable, *_FLAGS, f"--user-data-dir={profile}", address]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Browser(page, process, timeout_s)
        finally:
            page.closed.set()
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            server.shutdown()
            server.server_close()
