"""The report of a run that is under way: served on this machine alone, made anew for every look."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jinja2 import Environment

from siftune.base.errors import SiftuneError
from siftune.report.page.page import make_page

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_SECONDS = 15  # after which a browser asks again

_WAITING = Environment(autoescape=True).from_string("""\
<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><title>siftune report</title>
<p style="font: 16px/1.5 system-ui, sans-serif; margin: 2em">{{ words }}</p></html>
""")


@contextmanager
def serve(run: str | Path) -> Iterator[str]:
    """Serve the report of a run while a block goes on.

    Only this machine reaches it, under its own names: a page from elsewhere that has a name of its own resolve to this
    machine gets nothing.

    The run folder need not be there yet. Gives the address, with a port that was free.
    """
    server = _Server((_LOOPBACK, 0), partial(_Handler, str(run)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="siftune-report", daemon=True)
    thread.start()
    try:
        yield f"http://{_LOOPBACK}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    """Says nothing of browsers that leave before they are answered: the terminal is the training run's."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what went wrong with an answer out of the terminal."""
        logger.debug("no answer to %s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers one address."""

    timeout = 30

    def __init__(self, run: str, *given: Any) -> None:
        self._run = run
        self._port = given[2].server_port
        super().__init__(*given)

    def do_GET(self) -> None:
        """Answer with the page as the run now stands."""
        if self.headers.get("Host") not in (f"{_LOOPBACK}:{self._port}", f"localhost:{self._port}"):
            self.send_error(403)
        elif self.path != "/":
            self.send_error(404)
        else:
            self._send(_page(self._run))

    def _send(self, html: str) -> None:
        body = html.encode("utf-8", "replace")
        self.send_response(200)
        for name, value in {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(body)),
            "Refresh": str(_SECONDS),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is the training run's."""


def _page(run: str) -> str:
    """The page; words where there is nothing to show yet."""
    try:
        return make_page([run]).html
    except (SiftuneError, OSError) as error:
        return _WAITING.render(words=f"Nothing to show yet: {error}")
