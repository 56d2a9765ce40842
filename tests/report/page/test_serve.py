"""The report while runs go on: what is served, to whom, and when it changes."""

import contextlib
import http.client
import os
import socket
import struct
import threading
import time
from urllib.parse import urlsplit

import pytest
from random_results import alignment, random_results

from promot_jax import files
from promot_jax.errors import UserError
from promot_jax.report.page import serve


def ask(address, path="/", method="GET", **headers):
    """(status, headers, text) of one request."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def test_page_follows_the_results(tmp_path):
    with serve.serving(tmp_path, 0) as address:
        assert address.startswith("http://127.0.0.1:")
        status, headers, text = ask(address)
        assert status == 200 and "No run is finished yet" in text and headers["Refresh"] == str(serve.REFRESH)
        path = files.write(random_results(seeds=1, methods=("pretrained",)), tmp_path / "results.json")
        text = ask(address)[2]
        assert "pretrained" in text and "ProMoT</th>" not in text
        files.write(random_results(seeds=1), path)
        os.utime(path, (1, 1))  # whatever the clock of the file system
        assert "ProMoT</th>" in ask(address, "/report.html")[2]
        path.write_text("{")
        os.utime(path, (2, 2))
        status, _, text = ask(address)
        assert status == 503 and "cannot be read" in text
    with pytest.raises(ConnectionError):
        ask(address)


def test_page_of_several_tasks(tmp_path):
    for name in ("rte", "en_fr"):
        files.write(random_results(seeds=1), tmp_path / name / "results.json")
    with serve.serving(tmp_path, 0) as address:
        text = ask(address)[2]
    assert "Fine-tuned on rte" in text and "Fine-tuned on en_fr" in text


def test_page_follows_the_analyses_too(tmp_path):
    files.write(random_results(seeds=1), tmp_path / "report" / "results.json")
    with serve.serving(tmp_path / "report", 0, [tmp_path]) as address:
        assert 'id="alignment"' not in ask(address)[2]
        for folder, stage in (("", "stage2"), ("report", "finetune")):
            files.write(alignment(stage=stage), tmp_path / folder / "analyses" / "one" / "results.json")
            text = ask(address)[2]
            assert 'id="alignment"' in text and f"({stage} on sentiment, seed 0)" in text


def test_only_the_report_is_served_and_only_to_this_machine(tmp_path):
    files.write(random_results(seeds=1), tmp_path / "results.json")
    (tmp_path / "secret.txt").write_text("secret")
    with serve.serving(tmp_path, 0) as address:
        for path in ("/secret.txt", "/results.json", "/../secret.txt", "/?x"):
            status, _, text = ask(address, path)
            assert status == 404 and "secret" not in text
        for host in ("evil.example:80", "evil.example", "127.0.0.1.evil.example", "", ":80", "[::1]:80"):
            assert ask(address, Host=host)[0] == 403
        for host in ("127.0.0.1", "localhost", "localhost:80"):
            assert ask(address, Host=host)[0] == 200
        assert ask(address, method="POST")[0] == 501
        status, headers, text = ask(address, method="HEAD")
        assert status == 200 and not text and int(headers["Content-Length"]) > 1000
        assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"


def test_a_client_that_leaves_leaves_no_trace(tmp_path, capfd):
    """A browser that is closed while it loads; the right answer to a reset is silence."""
    files.write(random_results(seeds=3), tmp_path / "results.json")
    with serve.serving(tmp_path, 0) as address:
        for request in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HT"):
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", urlsplit(address).port)) as client:
                    client.sendall(request)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets
        assert ask(address)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_half_open_connections_hold_few_threads_and_nobody_up(tmp_path):
    with serve.serving(tmp_path, 0) as address, contextlib.ExitStack() as opened:
        before = threading.active_count()
        for _ in range(300):
            client = opened.enter_context(socket.create_connection(("127.0.0.1", urlsplit(address).port)))
            client.sendall(b"GET / HTTP/1.1\r\n")
        began = time.monotonic()
        assert ask(address)[0] == 200 and time.monotonic() - began < 5
        assert threading.active_count() - before <= 2 * serve.CONNECTIONS  # some are about to end


def test_port_that_is_taken_is_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="Cannot serve the report"), serve.serving(tmp_path, taken.getsockname()[1]):
            pass
    with pytest.raises(UserError, match="Cannot serve the report"), serve.serving(tmp_path, 99999):
        pass
