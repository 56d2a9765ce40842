"""The report served while a comparison runs: on this machine only, one page, read anew when results change."""

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from promot_jax.errors import UserError
from promot_jax.report.page import page
from promot_jax.results import schema

ADDRESS = "127.0.0.1"
REFRESH = 30  # seconds after which a browser asks again
CONNECTIONS = 16  # at a time


@contextlib.contextmanager
def serving(folder: Path, port: int, analysed: Sequence[Path] = ()) -> Iterator[str]:
    """Serves the report of a comparison's folder until the block ends.

    The page is made from `results.json`, or of several tasks from `<task>/results.json`, and from the gradient
    alignments in `analyses/*/`, whenever one of them changes.

    Args:
        folder: of the comparison.
        port: of 127.0.0.1; 0 takes a free one.
        analysed: further folders whose gradient alignments are shown.

    Yields:
        The address.

    Raises:
        UserError: the port is taken.
    """
    live = _Live(folder, analysed)
    try:
        server = _Server((ADDRESS, port), type("Handler", (_Handler,), {"live": live}))
    except (OSError, OverflowError) as error:
        raise UserError(f"Cannot serve the report on port {port} ({error}); give another one, or 0 for any.") from error
    thread = threading.Thread(target=server.serve_forever, name="report", daemon=True)
    thread.start()
    try:
        yield f"http://{ADDRESS}:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def find(folder: Path) -> list[Path]:
    """The `results.json` of a comparison, or those of its tasks."""
    whole = folder / "results.json"
    return [whole] if whole.is_file() else sorted(folder.glob("*/results.json"))


class _Live:
    """The page of the newest results."""

    def __init__(self, folder: Path, analysed: Sequence[Path]):
        self._folder, self._analysed, self._lock = folder, (folder, *analysed), threading.Lock()
        self._seen: Any = None
        self._page = ""

    def page(self) -> str:
        """The page; rendered only if a file has changed."""
        with self._lock:
            paths = find(self._folder)
            seen = [(path, path.stat().st_mtime_ns) for path in paths + page.analyses(*self._analysed)]
            if not paths:
                return "<p>No run is finished yet. This page looks again by itself.</p>"
            if seen != self._seen:
                names = [path.parent.name if len(paths) > 1 else "" for path in paths]
                found = {name: schema.read(path) for name, path in zip(names, paths, strict=True)}
                self._page = page.render(found, page.alignments(*self._analysed), self._folder)
                self._seen = seen
            return self._page


class _Server(ThreadingHTTPServer):
    """A thread for each of a few connections; where there are more, the oldest is closed for the newest."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any):
        self._open: dict[Any, None] = {}  # in the order that they came in
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Takes a connection."""
        self._open[request] = None
        for oldest in list(self._open)[:-CONNECTIONS]:
            self._open.pop(oldest, None)
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # which ends the wait of its thread
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Lets go of a connection."""
        self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that left; anything else is a bug, with its traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers for one page; anything else is not found."""

    timeout = 10.0  # seconds for a request to come in
    live: _Live

    def do_GET(self) -> None:
        """Sends the page."""
        # A page elsewhere could make a browser ask here under a name of its own: only our own names are answered.
        if self.headers.get("Host", "").partition(":")[0] not in (ADDRESS, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "Ask for 127.0.0.1.")
        elif self.path not in ("/", "/report.html"):
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "Only the report is here: /")
        else:
            try:
                text = self.live.page()
            except (UserError, OSError) as error:
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", str(error))
            else:
                self._send(HTTPStatus.OK, "text/html", text)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Refresh": str(REFRESH)}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        headers |= {"Content-Security-Policy": "frame-ancestors 'none'"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal shows the runs."""
