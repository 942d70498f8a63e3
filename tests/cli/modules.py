"""Small modules that run as children where the real servers cannot be made to do what a test needs."""

from __future__ import annotations

from pathlib import Path

# Listens, prints where, answers /health with 200, ends in order on SIGTERM.
WELL = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
flags = dict(text.lstrip("-").split("=", 1) for text in sys.argv[1:])
port = int(flags.get("port", flags.get("grpc-port", 0)))
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("noise", flush=True)
print(f"well listening on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""
# As above, and deaf to SIGTERM.
DEAF = WELL.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")
# Fails to start, and says why.
FAILING = "import sys\nsys.exit('failing: the reason')\n"
# Listens, and dies at once: a crash that no restart cures.
DYING = """
import os, signal
print("dying listening on 127.0.0.1:1", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def write(folder: Path, **sources: str) -> dict[str, str]:
    """Write modules, and return the environment in which they can be run by name."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return {"PYTHONPATH": str(folder)}
