"""The server of `local_hub`: storage of repositories and blobs, requests, users, and the faults that a test orders."""

import hashlib
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WRITER = "hf_writerwriterwriterwriterwriterwr"  # user alice
READER = "hf_readerreaderreaderreaderreaderre"  # user bob, who may not write
USERS = {WRITER: "alice", READER: "bob"}
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class Storage:
    """Repositories in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        (folder / "lfs").mkdir(parents=True, exist_ok=True)

    def blob(self, oid: str) -> Path:
        return self.folder / "lfs" / oid

    def read(self, repo: str) -> dict[str, Any]:
        file = self.folder / "repos" / f"{repo}.json"
        if not file.is_file():
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return json.loads(file.read_text())

    def write(self, repo: str, content: dict[str, Any]) -> None:
        file = self.folder / "repos" / f"{repo}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content))
        os.replace(unfinished, file)

    def commit(self, content: dict[str, Any], branch: str, files: dict[str, Any], title: str) -> str:
        parent = content["branches"].get(branch)
        oid = hashlib.sha1(json.dumps([parent, files, title], sort_keys=True).encode()).hexdigest()
        content["commits"][oid] = {"parent": parent, "files": files, "title": title}
        content["branches"][branch] = oid
        return oid


def route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        _ROUTES.append((method, re.compile(f"^{pattern}$"), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One connection. The server holds the storage, the log and the faults that a test has ordered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: "HubServer"

    def log_message(self, *args: object) -> None:
        pass

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        path = urllib.parse.unquote(url.path)
        self.body_read = False
        self.server.log(self.command, path, self.headers)
        try:
            self._misbehave(path)
            for method, pattern, function in _ROUTES:
                match = pattern.match(path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    function(self, **match.groupdict())
                    return
            raise Refusal(404, f"No route for {self.command} {path}", "EntryNotFound")
        except Refusal as refusal:
            self.drain()
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.answer({"error": refusal.message}, refusal.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _misbehave(self, path: str) -> None:
        fault = self.server.take_fault(self.command, path)
        self.loses_answer = fault is not None and fault["kind"] == "lose answer"
        if fault is None or self.loses_answer:
            return
        if fault["kind"] == "status":
            self.drain()
            raise Refusal(fault["status"], "The server is busy", **{"Retry-After": "0"})
        self.rfile.read(min(fault.get("after", 0), int(self.headers.get("Content-Length", 0))))
        if fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self._reset()

    def _reset(self) -> None:
        """A reset, and not an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionResetError

    def drain(self) -> None:
        if not self.body_read:
            self.body()

    def body(self) -> bytes:
        self.body_read = True
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length)
        if len(content) < length:
            raise ConnectionResetError
        return content

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")

    def answer(self, content: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.loses_answer:
            self._reset()
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------------- permissions
    @property
    def user(self) -> str | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        if header.removeprefix("Bearer ") not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS[header.removeprefix("Bearer ")]

    def repository(self, repo: str, write: bool = False) -> dict[str, Any]:
        try:
            content = self.server.storage.read(repo)
        except Refusal:
            if self.user is None:  # as the Hub, which does not tell
                raise Refusal(401, "Repository Not Found", "RepoNotFound") from None
            raise
        if content["private"] and self.user != content["owner"]:
            raise Refusal(404 if self.user else 401, "Repository Not Found", "RepoNotFound")
        if write and self.user != content["owner"]:
            raise Refusal(403 if self.user else 401, "You don't have the rights to write to this repository")
        return content

    def revision(self, content: dict[str, Any], revision: str) -> str:
        oid = content["branches"].get(revision, revision)
        if oid not in content["commits"]:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class HubServer(ThreadingHTTPServer):
    """The server, with the faults that a test has ordered and what it has seen."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.storage = Storage(folder)
        self.faults: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.authorized: list[str] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def log(self, method: str, path: str, headers: Any) -> None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            if headers.get("Authorization"):
                self.authorized.append(f"{method} {path}")

    def fail(self, method: str, pattern: str, kind: str, times: int = 1, **how: int) -> None:
        """Order a fault for the next requests that match: a `status`, a `reset` or a `kill` of the server after some
        bytes, or `lose answer`, a reset when all is done."""
        self.faults.append({"method": method, "pattern": pattern, "kind": kind, "times": times, **how})

    def take_fault(self, method: str, path: str) -> dict[str, Any] | None:
        with self._lock:
            for fault in self.faults:
                if fault["times"] and fault["method"] == method and re.search(fault["pattern"], path):
                    fault["times"] -= 1
                    return fault
        return None

    # ------------------------------------------------------------------------------------------ for a test to look at
    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The content of a branch, every file of which must be there in full."""
        content = self.storage.read(repo)
        return {
            name: self._content(entry)
            for name, entry in content["commits"][content["branches"][branch]]["files"].items()
        }

    def _content(self, entry: dict[str, Any]) -> bytes:
        data = self.storage.blob(entry["oid"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["oid"]
        return data

    def history(self, repo: str, branch: str = "main") -> list[dict[str, Any]]:
        """The commits of a branch, the latest first."""
        content = self.storage.read(repo)
        oid, found = content["branches"].get(branch), []
        while oid:
            found.append(content["commits"][oid])
            oid = found[-1]["parent"]
        return found


# ------------------------------------------------------------------------------------------------------ the routes
