"""An HTTP server that behaves as badly as it is told to."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves a folder from 127.0.0.1, as badly as it is told to."""

    daemon_threads = True
    ranges = True
    drop_after = 0
    """Bytes after which a connection is cut; 0: never."""
    pause = 0.0
    """Seconds between the last byte and the cut: without any, a client may lose what it has received."""
    delay = 0.0
    """Seconds before each answer."""
    stalls: list[str]
    """Requests for these names get headers and then nothing."""
    failures = 0
    """So many of the next requests are answered with 503."""
    requests: list[str]


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, Path(self.translate_path(self.path))
        server.requests.append(self.path)
        time.sleep(server.delay)
        if server.failures:
            server.failures -= 1
            return self.send_error(503)
        if not path.is_file():
            return self.send_error(404)
        data, start = path.read_bytes(), 0
        wanted = self.headers.get("Range", "")
        if server.ranges and wanted.startswith("bytes="):
            first, _, last = wanted[6:].partition("-")
            start, end = int(first), min(int(last or len(data)) + 1, len(data))
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            end = len(data)
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if path.name in server.stalls:
            server.stalls.remove(path.name)
            time.sleep(5)
            return None
        body = data[start:end]
        self.wfile.write(body[: server.drop_after or None])
        self.wfile.flush()
        if len(body) > server.drop_after > 0:
            time.sleep(server.pause)
        self.close_connection = True
        return None


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Server, str]]:
    server = Server(("127.0.0.1", 0), lambda *a, **k: Handler(*a, directory=str(folder), **k))
    server.stalls, server.requests = [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
