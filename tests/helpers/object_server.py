"""An S3 server on loopback (moto), and a proxy before it that fails as a test wants."""

import contextlib
import http.client
import http.server
import importlib.util
import logging
import threading
import time

if importlib.util.find_spec("moto") is None:  # imported by who serves: it takes a second of who collects
    raise ModuleNotFoundError("moto[server] is not installed", name="moto")

STALL = 4.0  # seconds that a stalled answer takes


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on, unless `faults` has something else for a range read (or, with `all`, any)."""

    backend: tuple[str, int]
    faults: list[str] = []  # noqa: RUF012 - one proxy a session
    everything = False
    seen: list[str] = []  # noqa: RUF012
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        Proxy.seen.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        ranged = Proxy.everything or "Range" in self.headers
        fault = Proxy.faults.pop(0) if Proxy.faults and ranged else ""
        if fault == "stall":
            time.sleep(STALL)
        if fault in ("stall", "drop"):
            self.close_connection = True
            return
        if fault == "500":
            self.answer(500, [("Content-Length", "0")], b"")
            return
        onward = http.client.HTTPConnection(*Proxy.backend)
        onward.request(self.command, self.path, body, dict(self.headers))
        reply = onward.getresponse()
        data = reply.read()
        headers = [
            (k, v) for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "connection")
        ]
        onward.close()
        if fault == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "truncate":
            self.close_connection = True
            data = data[: len(data) // 2]
        self.answer(reply.status, headers, data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def answer(self, status, headers, data):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running():
    """Start both; gives the URL of the proxy."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    Proxy.backend = server.get_host_and_port()
    front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    front.daemon_threads = True
    threading.Thread(target=front.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{front.server_address[1]}"
    finally:
        front.shutdown()
        server.stop()


def environment_variables(endpoint):
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", **dict.fromkeys(names, "test")}
