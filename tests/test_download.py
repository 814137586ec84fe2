"""Files of data sets are downloaded where they are missing; why that failed is said."""

import errno
import functools
import http.server
import socket
import ssl
import threading

import pytest
from conftest import NOWHERE, load_data
from test_data import NAMES, put, resources_of, small_files
from torchvision import datasets

from capsrun.data.files import Home, obtain, read_file
from capsrun.errors import UserError


class Mirror(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, or only the beginning of its files, or answers as it is asked to."""

    whole = True

    def do_GET(self):
        wanted = self.path.rpartition("/")[2]
        if self.path.startswith("http:"):  # as to a proxy
            self.send_error(407)
        elif wanted.isdigit():
            self.send_error(int(wanted))
        else:
            super().do_GET()

    def do_CONNECT(self):
        self.send_error(407)

    def copyfile(self, source, outputfile):
        outputfile.write(source.read() if self.whole else source.read()[:50])

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder, and the address under which it is served on this machine."""
    monkeypatch.setattr(Mirror, "whole", True)
    folder = tmp_path / "mirror"
    folder.mkdir()
    handler = functools.partial(Mirror, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_what_is_missing_is_downloaded_from_the_next_mirror_too(in_tmp, mirror, monkeypatch):
    folder, address = mirror
    put(folder, small_files(), monkeypatch)
    monkeypatch.setattr(datasets.MNIST, "resources", resources_of(folder))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [NOWHERE, address])
    assert len(load_data("mnist").train) == 20
    files = {path.name for path in (in_tmp / "data").rglob("*") if path.is_file()}
    assert files == {f"{name}.gz" for name in NAMES}
    monkeypatch.setattr(datasets.MNIST, "mirrors", [NOWHERE])
    assert len(load_data("mnist").train) == 20


def test_missing_data_without_network_is_one_clear_message(in_tmp, monkeypatch, refused):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [NOWHERE])
    message = refused("data", "dataset=mnist")
    assert "data/MNIST/raw and could not be downloaded" in message
    for part in ("Connection refused", "CAPSRUN_DATA", "dataset=mnist5k works without a download"):
        assert part in message
    assert list(in_tmp.iterdir()) == [], "no empty folder stays"


def fetch(tmp_path, *urls, md5=None):
    """Download a file of a set into a new folder."""
    home = Home(tmp_path / "new", "folder", "This", "do that")
    return obtain(home, "file.gz", urls, md5, read_file)


def why_not(tmp_path, *urls, md5=None):
    """Why that cannot be done; it leaves nothing."""
    with pytest.raises(UserError, match=r"This is not in \S+ and could .*; do that$") as caught:
        fetch(tmp_path, *urls, md5=md5)
    assert not (tmp_path / "new").exists()
    return str(caught.value).partition("downloaded: ")[2]


@pytest.mark.parametrize(
    ("name", "whole", "message"),
    [
        ("file.gz", True, "the file does not have the published MD5 checksum"),
        ("file.gz", False, "IncompleteRead(50 bytes read"),
        ("login.html", True, "a web page came instead of the file"),
        ("403", True, "403 Client Error: Forbidden;"),
        ("404", True, "404 Client Error: Not Found;"),
        ("503", True, "503 Server Error: Service Unavailable;"),
    ],
)
def test_why_a_download_failed_is_said(tmp_path, mirror, monkeypatch, name, whole, message):
    folder, address = mirror
    (folder / "file.gz").write_bytes(bytes(1000))
    (folder / "login.html").write_bytes(b"<html>Welcome to the network</html>")
    monkeypatch.setattr(Mirror, "whole", whole)
    said = why_not(tmp_path, address + name, md5="0" * 32)
    assert said.startswith(f"{address}{name}: {message}")
    both = why_not(tmp_path, address + name, NOWHERE, md5="0" * 32)
    assert both.startswith(f"{address}{name}: {message.rstrip(';')}")
    assert f", and {NOWHERE}: [Errno 111] Connection refused" in both


def test_a_web_page_is_not_taken_for_a_file_without_a_checksum(tmp_path, mirror):
    folder, address = mirror
    (folder / "file.gz").write_bytes(b"<!doctype html>")
    assert "a web page" in why_not(tmp_path, f"{address}file.gz")
    (folder / "file.gz").write_bytes(b"data")
    assert fetch(tmp_path, f"{address}file.gz") == b"data"


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ("{}", "407 Proxy Authentication Required"),
        (NOWHERE, "the proxy: [Errno 111] Connection refused"),
        ("socks5://127.0.0.1:9", "SOCKS"),
        ("squid://127.0.0.1:9", "Proxy URL had unsupported scheme squid"),
    ],
)
def test_why_a_proxy_lets_nothing_through_is_said(tmp_path, mirror, monkeypatch, proxy, message):
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("https_proxy", proxy.format(mirror[1]))
    assert message in why_not(tmp_path, "https://example.com/file", md5="0" * 32)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (OSError(113, "No route to host"), "No route to host"),
        (TimeoutError(110, "Connection timed out"), "Connection timed out"),
        (ssl.SSLCertVerificationError("certificate verify failed: self-signed"), "self-signed"),
    ],
)
def test_why_nothing_answers_is_said(tmp_path, monkeypatch, error, message):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("urllib3.util.connection.create_connection", fail)
    assert message in why_not(tmp_path, NOWHERE)


def test_a_full_disk_is_not_the_servers_fault(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pooch.HTTPDownloader.__call__", fail)
    assert why_not(tmp_path, NOWHERE, NOWHERE).startswith("[Errno 28] No space left on device")


DOWNLOADED = ["mnist", "fashion_mnist", "kmnist", "affnist", "cifar10", "svhn", "smallnorb"]


@pytest.mark.parametrize("name", DOWNLOADED)
def test_each_set_says_why_and_what_to_put_where(name, in_tmp, monkeypatch):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, NOWHERE)
    with pytest.raises(
        UserError, match=r"is not in data.*: \[Errno 111\] Connection refused; put "
    ):
        load_data(name)
    assert not (in_tmp / "data").exists()
