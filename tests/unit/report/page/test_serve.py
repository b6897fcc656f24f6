"""A run's report while it trains: on this machine alone, as the run now stands."""

import http.client
import queue
import socket
import struct
import threading
import urllib.error
import urllib.request

import pytest
from support.report_runs import save_run

from siftune.report.page.serve import serve


def get(address, **headers):
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode(), answer.headers


def test_the_page_is_that_of_the_moment(tmp_path):
    with serve(tmp_path / "run") as address:
        html, headers = get(address)
        assert "Nothing to show yet" in html
        assert int(headers["Refresh"]) > 0
        run = save_run(tmp_path / "run", steps=4)
        (run / "run.json").unlink()
        assert "“run” is at step 4 of 4" in get(address)[0]
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
        assert "training loss 2.500" in get(address)[0]
    with pytest.raises(urllib.error.URLError):
        get(address)


def test_nobody_else_is_answered(tmp_path):
    with serve(tmp_path) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        assert address == f"http://127.0.0.1:{port}/"
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}.evil.example"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                get(address, Host=host)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{address}../../etc/passwd")
        assert get(address, Host=f"localhost:{port}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", "/", body="x")
        assert connection.getresponse().status == 501
        with socket.socket() as probe:  # another address of this machine, which one for all networks would answer
            probe.settimeout(2)
            assert probe.connect_ex(("127.0.0.2", port)) != 0


def test_a_browser_that_leaves_is_not_told_of(tmp_path, capfd, monkeypatch):
    left, answering = threading.Event(), queue.Queue()

    def slow(run):
        answering.put(threading.current_thread())
        assert left.wait(10)
        return "x" * 10**7

    monkeypatch.setattr("siftune.report.page.serve._page", slow)
    with serve(tmp_path) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            browser.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            thread = answering.get(timeout=10)
        left.set()
        thread.join(10)
    assert capfd.readouterr() == ("", "")


def test_what_stands_in_an_error_is_escaped(tmp_path):
    with serve(tmp_path / "<script>alert(1)</script>") as address:
        assert "<script>" not in get(address)[0]
