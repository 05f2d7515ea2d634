"""A server on loopback between a client and a real one, that makes some of the requests fail."""

import http.client
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LATE_SECONDS = 2.5  # longer than the clients of the tests wait


class Proxy:
    """Passes requests on to `port` of loopback. `fail` makes some of them fail, in one of these ways:

    "reset" (before the server has seen it), "lost" (the server has done it, the answer never comes), "late" (comes
    after LATE_SECONDS), "500", "page" (to log in), "cut" (half an answer)."""

    def __init__(self, port: int) -> None:
        self.port, self.requests = port, 0
        self.kind, self.first, self.last = "", 0, -1
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def handle_any(self) -> None:
                proxy.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client has gone, as it may

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fail(self, kind: str, first: int = 0, times: int = 1_000_000) -> None:
        """From now on, `times` requests fail after `first` that do not; no kind: none."""
        self.kind, self.first, self.last = kind, self.requests + first, self.requests + first + times - 1

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        number, self.requests = self.requests, self.requests + 1
        kind = self.kind if self.first <= number <= self.last else ""
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if kind == "reset":
            return self._drop(handler)
        if kind == "500":
            return self._reply(handler, 500, {}, b'{"error_code": "INTERNAL_ERROR", "message": "out of order"}')
        if kind == "page":
            return self._reply(handler, 200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
        server = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() != "host"}
            server.request(handler.command, handler.path, body, headers | {"Host": f"127.0.0.1:{self.port}"})
            done = server.getresponse()
            content = done.read()
        except OSError:
            return self._drop(handler)
        finally:
            server.close()
        if kind == "lost":
            return self._drop(handler)
        if kind == "late":
            time.sleep(LATE_SECONDS)
        kept = {name: value for name, value in done.getheaders() if name.lower() in ("content-type", "location")}
        self._reply(handler, done.status, kept, content, cut=kind == "cut")

    def _reply(
        self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes, cut: bool = False
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            handler.close_connection = True

    def _drop(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
