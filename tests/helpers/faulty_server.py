"""An HTTP server on loopback that serves a folder and, when told to, does it badly."""

import re
import socket
import struct
import threading
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = b"<!DOCTYPE html><html><body>Please accept our cookies</body></html>"


class FaultyServer(ThreadingHTTPServer):
    """Faults of a file are used up one by one, in the order of its requests; then it is served as it is.

    A fault is an HTTP status as a number, or one of: reset (connection reset in mid-body), short (closed in mid-body),
    long (a Content-Length of 100 bytes too many), less (half of the file, called the whole), page (a web page, status
    200), flip (one bit of the body), stall (nothing comes after half of the body), drip (a byte at a time comes
    after half of it).
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = ranges
        self.faults: defaultdict[str, list] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.seen: list[tuple[str, str | None]] = []  # path with its query, Authorization
        self.released = threading.Event()  # ends all stalls
        self.hold: threading.Event | None = None  # bodies wait for it
        self.now = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Broken connections are what it is for."""


@contextmanager
def serving(folder: Path, **options):
    server = FaultyServer(folder, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, *args):
        """Quiet."""

    def do_GET(self):
        server, name = self.server, self.path.partition("?")[0].rpartition("/")[2]
        with server.lock:
            server.requests[name] += 1
            server.seen.append((self.path, self.headers.get("Authorization")))
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
            fault = server.faults[name].pop(0) if server.faults[name] else None
        try:
            if server.hold:
                server.hold.wait(30)
            self.answer(server.folder / name, fault)
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, path: Path, fault):
        if not path.is_file():
            fault = fault or 404
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, status = (PAGE, 200) if fault == "page" else self.body(path)
        if fault == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 8]) + body[middle + 1 :]
        if fault == "less":
            body = body[: len(body) // 2]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + (100 if fault == "long" else 0)))
        self.end_headers()
        half = len(body) // 2 if fault in ("reset", "short", "stall", "drip") else len(body)
        self.wfile.write(body[:half])
        self.wfile.flush()
        if fault == "stall":
            self.server.released.wait(30)
        if fault == "drip":
            self.drip(body[half:])
        if fault == "reset":
            # Closing with a lingering time of 0 sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def drip(self, body: bytes):
        for n in range(len(body)):
            if self.server.released.wait(0.05):
                return
            with suppress(OSError):
                self.wfile.write(body[n : n + 1])
                self.wfile.flush()

    def body(self, path: Path) -> tuple[bytes, int]:
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not self.server.ranges:
            return data, 200
        return data[int(asked[1]) : int(asked[2]) + 1], 206
