"""The HTTP side: it turns requests into calls, and answers into bytes, each connection in a thread of its own."""

import json
import socket
import socketserver
import struct
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from loopback_hub.faults import Fault, Faults
from loopback_hub.routes import Answer, Call, answer_call
from loopback_hub.storage import HttpError, Storage

# Bytes of a file in memory at a time.
CHUNK = 1 << 20


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    # Head and body are sent one after the other. Without this, the body waits until the client has confirmed the head.
    disable_nagle_algorithm = True
    server: "Server"

    def handle_call(self) -> None:
        """Answer one request."""
        if self.server.stopped.is_set():
            # The client sees a closed connection, as if the process had ended.
            raise ConnectionError("the server was stopped")
        url, body = urlsplit(self.path), self.read_body()
        fault = self.server.faults.take(self.command, url.path)
        if fault is not None and self.fail(fault):
            return
        call = Call(self.server.storage, self.command, url.path, parse_qs(url.query), self.headers, body)
        try:
            if "Transfer-Encoding" in self.headers:
                # No client sends a body of unknown length. The next request on this connection could not be found.
                self.close_connection = True
                raise HttpError(411, "expected a body with Content-Length, got a chunked one")
            answer = answer_call(call)
        except HttpError as error:
            answer = Answer(error.body, error.status, error.headers)
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            answer = Answer({"error": f"a fault of the loopback Hub itself: {error!r}"}, 500)
        # The next request on this connection starts after this body, even if nobody wanted the body.
        for _ in body:
            pass
        self.send_answer(answer, fault.action if fault else None)

    # The names under which BaseHTTPRequestHandler looks for a method.
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_call

    def fail(self, fault: Fault) -> bool:
        """Do what a fault wants before the request is read. Return whether nothing more is to be done."""
        self.server.stopped.wait(fault.delay_s)
        length = int(self.headers.get("Content-Length") or 0)
        if fault.action == "reset":
            self.rfile.read(length // 2)
            # With this option, closing the socket sends a reset in place of an orderly end. `shutdown` would send one.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            raise ConnectionError("a fault on purpose")
        if fault.status is None and fault.action != "page":
            return False
        for _ in self.read_body():
            pass
        if fault.action == "page":
            self.send_answer(Answer("<html>Please log in.</html>", headers={"Content-Type": "text/html"}))
        else:
            refusal = HttpError(fault.status or 500, f"a fault on purpose, {fault.status}", headers=fault.headers)
            self.send_answer(Answer(refusal.body, refusal.status, refusal.headers))
        return True

    def read_body(self) -> Iterator[bytes]:
        """Yield the body in chunks."""
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            piece = self.rfile.read(min(left, CHUNK))
            if not piece:
                raise ConnectionError(f"the client hung up with {left} bytes to come")
            left -= len(piece)
            yield piece

    def send_answer(self, answer: Answer, action: str | None = None) -> None:
        """Send head and body of an answer. `action` is that of a fault."""
        if isinstance(answer.value, str):
            kind, data = "text/plain; charset=utf-8", answer.value.encode()
        else:
            # A date in a card is no JSON: `default=str` writes it as text.
            kind, data = "application/json", json.dumps(answer.value, default=str).encode()
        length = answer.end - answer.start if answer.file else len(data)
        self.send_response(answer.status)
        for name, value in {"Content-Type": kind, **answer.headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if action == "cut":
            # The head has promised more bytes than the client gets.
            length, self.close_connection = length // 2, True
        if answer.file is None:
            self.wfile.write(data[:length])
            return
        with answer.file.open("rb") as file:
            file.seek(answer.start)
            while length > 0 and (piece := file.read(min(length, CHUNK))):
                length -= len(piece)
                if action == "damage":
                    piece, action = bytes([piece[0] ^ 1]) + piece[1:], None
                self.wfile.write(piece)

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request, if the server should."""
        if self.server.verbose:
            super().log_message(format, *args)


class Server(ThreadingHTTPServer):
    """A server of a storage on 127.0.0.1. Port 0 takes a free one."""

    # The default of 5 is too few for a client that opens many connections at once.
    request_queue_size = 128

    def __init__(self, storage: Storage, port: int, verbose: bool, faults: Faults) -> None:
        self.storage, self.verbose, self.faults = storage, verbose, faults
        self.stopped = threading.Event()
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self) -> None:
        """Take the port, and do not ask the name server for this machine's name as HTTPServer does.

        Offline that may take long.
        """
        socketserver.TCPServer.server_bind(self)

    def shutdown(self) -> None:
        """Stop serving, also in the threads of open connections."""
        # A thread of a connection that is kept open goes on after the server's end.
        self.stopped.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print an error, unless a client hung up. That is no fault of the server."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)
