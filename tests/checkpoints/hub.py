"""A stand-in for a Hugging Face hub: what a snapshot download asks for, served from a directory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


def _handler(root: Path) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (a class of short methods)
    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[0] == "api":
                self.describe(*parts[1:4], rest=parts[4:])
            elif parts[0] == "datasets":
                self.resolve("datasets", *parts[1:3], rest=parts[3:])
            else:
                self.resolve("models", *parts[:2], rest=parts[2:])

        def describe(self, kind: str, owner: str, name: str, *, rest: list[str]) -> None:
            files = sorted((root / kind / owner / name).glob("*"))
            if not files:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40} for file in files
                ]
                self.answer(200, json.dumps(tree).encode())
            else:
                siblings = [{"rfilename": file.name} for file in files]
                info = {"_id": "0", "id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
                self.answer(200, json.dumps({**info, "private": False, "tags": [], "downloads": 0}).encode())

        def resolve(self, kind: str, owner: str, name: str, *, rest: list[str]) -> None:
            file = (root / kind / owner / name).joinpath(*rest[2:])
            if not file.is_file():
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Hub


@contextmanager
def serve_hub(root: Path) -> Iterator[str]:
    """Serve the repositories at `models/<owner>/<name>` and `datasets/<owner>/<name>` below `root`; the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(root))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
