"""A small Hub on the loopback interface, for tests: the HTTP API that `huggingface_hub` speaks, with LFS storage.

Repositories, branches, commits and blobs are files, so that a server that was killed goes on where it was. Everything
is committed atomically or refused, files that a commit names must be in the storage, and a token is needed to write.

Run as a program it serves until it is killed: `python local_hub.py FOLDER PORT`.
"""

import base64
import fnmatch
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

import yaml

WRITER = "hf_writerwriterwriterwriterwriterwr"  # user alice
READER = "hf_readerreaderreaderreaderreaderre"  # user bob, who may not write
USERS = {WRITER: "alice", READER: "bob"}
LFS_FROM = 2**16  # bytes; smaller files are part of the commit, as on the Hub, except weights
MULTIPART_FROM, PART = 2**18, 2**17
LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "openrail", "llama3", "gemma", "other", "unknown")
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


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
@route("GET", "/api/whoami-v2")
def whoami(self: Handler) -> None:
    if self.user is None:
        raise Refusal(401, "Invalid user token.")
    self.answer({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


@route("POST", "/api/validate-yaml")
def validate_yaml(self: Handler) -> None:
    text = self.json()["content"]
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    errors = []
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        metadata, errors = {}, [{"message": str(error)}]
    errors += [{"message": problem} for problem in metadata_problems(metadata or {})]
    if "text/plain" in self.headers.get("Accept", ""):
        self.answer("\n".join(error["message"] for error in errors).encode(), 400 if errors else 200)
    else:
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)


def metadata_problems(metadata: dict[str, Any]) -> list[str]:
    """What the Hub would refuse in a card's metadata."""
    problems = []
    if "license" in metadata and metadata["license"] not in LICENSES:
        problems.append(f'"license" must be one of {", ".join(LICENSES)}')
    for name in ("pipeline_tag", "library_name", "license_name", "license_link"):
        if name in metadata and not isinstance(metadata[name], str):
            problems.append(f'"{name}" must be a string')
    for name in ("tags", "datasets", "language", "base_model"):
        values = metadata.get(name, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            problems.append(f'"{name}" must be a string or a list of strings')
        elif name in ("datasets", "base_model"):
            problems += [
                f'"{name}" with value {value!r} is not valid'
                for value in values
                if not re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", value)
            ]
    return problems


@route("POST", "/api/repos/create")
def create_repo(self: Handler) -> None:
    wanted = self.json()
    owner = wanted.get("organization") or self.user
    repo = f"{owner}/{wanted['name']}"
    if self.user is None:
        raise Refusal(401, "Invalid username or password.")
    if owner != self.user or self.user == "bob":
        raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    with self.server.storage.lock:
        try:
            self.server.storage.read(repo)
        except Refusal:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            content = {"owner": self.user, "private": private, "branches": {}, "commits": {}}
            attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            entry = keep(self.server.storage, attributes)
            self.server.storage.commit(content, "main", {".gitattributes": entry}, "initial commit")
            self.server.storage.write(repo, content)
        else:
            self.answer({"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}, 409)
            return
    self.answer({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})


def keep(storage: Storage, data: bytes) -> dict[str, Any]:
    """Put a small file into the storage; its entry in a commit."""
    oid = hashlib.sha256(data).hexdigest()
    storage.blob(oid).write_bytes(data)
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"oid": oid, "size": len(data), "git": git, "lfs": False}


@route("GET", rf"/api/models/{_REPO}(?:/revision/(?P<revision>.+))?")
def model_info(self: Handler, repo: str, revision: str | None) -> None:
    content = self.repository(repo)
    oid = self.revision(content, revision or "main")
    files = content["commits"][oid]["files"]
    self.answer(
        {
            "_id": repo,
            "id": repo,
            "modelId": repo,
            "sha": oid,
            "private": content["private"],
            "gated": False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in files],
        },
        headers={"X-Repo-Commit": oid},
    )


@route("GET", rf"/api/models/{_REPO}/refs")
def refs(self: Handler, repo: str) -> None:
    branches = self.repository(repo)["branches"]
    listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches.items()]
    self.answer({"branches": listed, "converts": [], "tags": [], "pullRequests": []})


def tree_entry(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    listed = {"type": "file", "path": name, "size": entry["size"], "oid": entry["git"]}
    if entry["lfs"]:
        listed["lfs"] = {"oid": entry["oid"], "size": entry["size"], "pointerSize": 130}
    return listed


@route("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(self: Handler, repo: str, revision: str, path: str | None) -> None:
    content = self.repository(repo)
    files = content["commits"][self.revision(content, revision)]["files"]
    prefix = f"{path}/" if path else ""
    listed, folders = [], set()
    for name, entry in files.items():
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if "/" in rest:
            folders.add(prefix + rest.split("/")[0])
            if self.query.get("recursive", "").lower() not in ("true", "1"):
                continue
        listed.append(tree_entry(name, entry))
    if prefix and not listed and not folders:
        raise Refusal(404, f"{path} does not exist", "EntryNotFound")
    listed += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
    # One entry a page at first, so that the client's paging is used.
    start = int(self.query.get("cursor", 0))
    end = 2 if start == 0 else len(listed)
    query = {**self.query, "cursor": str(end)}
    headers = {}
    if end < len(listed):
        address = f"{self.server.url}/api/models/{repo}/tree/{urllib.parse.quote(revision, safe='')}"
        address += f"/{path}" if path else ""
        headers["Link"] = f'<{address}?{urllib.parse.urlencode(query)}>; rel="next"'
    self.answer(listed[start:end], headers=headers)


@route("POST", rf"/api/models/{_REPO}/paths-info/(?P<revision>.+)")
def paths_info(self: Handler, repo: str, revision: str) -> None:
    content = self.repository(repo)
    files = content["commits"][self.revision(content, revision)]["files"]
    body = self.body().decode()
    wanted = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
    self.answer([tree_entry(name, files[name]) for name in wanted if name in files])


@route("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)")
def create_branch(self: Handler, repo: str, branch: str) -> None:
    wanted = self.json()
    with self.server.storage.lock:
        content = self.repository(repo, write=True)
        if branch in content["branches"]:
            raise Refusal(409, f"Reference already exists: {branch}")
        content["branches"][branch] = self.revision(content, wanted.get("startingPoint", "main"))
        self.server.storage.write(repo, content)
    self.answer({})


@route("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)")
def preupload(self: Handler, repo: str, revision: str) -> None:
    wanted = self.json()
    content = self.repository(repo, write="create_pr" not in self.query)
    present = content["commits"][self.revision(content, revision)]["files"]
    ignored = wanted.get("gitIgnore")
    if not ignored and ".gitignore" in present:
        ignored = self.server.storage.blob(present[".gitignore"]["oid"]).read_text()
    answers = []
    for file in wanted["files"]:
        binary = b"\0" in base64.b64decode(file["sample"])
        lfs = file["path"].endswith((".safetensors", ".bin", ".pt")) or binary or file["size"] >= LFS_FROM
        entry = present.get(file["path"])
        oid = None if entry is None else entry["oid" if entry["lfs"] else "git"]
        ignore = any(fnmatch.fnmatch(file["path"], pattern) for pattern in (ignored or "").split())
        mode = "lfs" if lfs else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
    self.answer({"files": answers})


@route("POST", rf"/{_REPO}\.git/info/lfs/objects/batch")
def lfs_batch(self: Handler, repo: str) -> None:
    wanted = self.json()
    self.repository(repo, write="ref" in wanted)  # without a ref for a pull request, which every user may open
    objects = []
    for item in wanted["objects"]:
        found = {"oid": item["oid"], "size": item["size"]}
        if not self.server.storage.blob(item["oid"]).is_file():
            href = f"{self.server.url}/storage/{item['oid']}?signature={sign(item['oid'])}"
            upload: dict[str, Any] = {"href": href}
            if item["size"] >= MULTIPART_FROM and "multipart" in wanted["transfers"]:
                parts = range(1, -(-item["size"] // PART) + 1)
                header = {f"{part:05d}": f"{href}&part={part}" for part in parts}
                upload = {"href": f"{href}&complete=1", "header": {"chunk_size": str(PART), **header}}
            verify = {"href": f"{self.server.url}/{repo}.git/info/lfs/objects/verify"}
            found["actions"] = {"upload": upload, "verify": verify}
        objects.append(found)
    self.answer({"transfer": "basic", "objects": objects})


def sign(oid: str) -> str:
    return hashlib.sha256(b"storage" + oid.encode()).hexdigest()


@route("PUT", r"/storage/(?P<oid>[0-9a-f]{64})")
def store(self: Handler, oid: str) -> None:
    if self.query.get("signature") != sign(oid):
        raise Refusal(403, "The address is not signed")
    data, part = self.body(), self.query.get("part")
    if part is None and hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "The content does not fit its hash")
    target = self.server.storage.blob(oid if part is None else f"{oid}.{int(part):05d}")
    unfinished = target.with_name(f"{target.name}.{threading.get_ident()}")
    unfinished.write_bytes(data)
    os.replace(unfinished, target)
    self.answer({}, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})


@route("POST", r"/storage/(?P<oid>[0-9a-f]{64})")
def complete(self: Handler, oid: str) -> None:
    numbers = [part["partNumber"] for part in self.json()["parts"]]
    data = b"".join(self.server.storage.blob(f"{oid}.{number:05d}").read_bytes() for number in numbers)
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "The parts do not fit the hash")
    self.server.storage.blob(oid).write_bytes(data)
    self.answer({})


@route("POST", rf"/{_REPO}\.git/info/lfs/objects/verify")
def lfs_verify(self: Handler, repo: str) -> None:
    wanted = self.json()
    self.repository(repo)
    blob = self.server.storage.blob(wanted["oid"])
    if not blob.is_file() or blob.stat().st_size != wanted["size"]:
        raise Refusal(404, "Not in the storage")
    self.answer({})


@route("POST", rf"/api/models/{_REPO}/commit/(?P<branch>.+)")
def commit(self: Handler, repo: str, branch: str) -> None:
    lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
    storage = self.server.storage
    with storage.lock:
        pull_request = "create_pr" in self.query
        content = self.repository(repo, write=not pull_request)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if branch not in content["branches"]:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent and parent != content["branches"][branch]:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(content["commits"][content["branches"][branch]]["files"])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = keep(storage, base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                blob = storage.blob(value["oid"])
                if not blob.is_file():
                    raise Refusal(400, f"{value['path']} is not in the storage")
                size = blob.stat().st_size
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n"
                git = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer.encode()).hexdigest()
                files[value["path"]] = {"oid": value["oid"], "size": size, "git": git, "lfs": True}
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, f"{value['path']} does not exist", "EntryNotFound")
            else:
                raise Refusal(400, f"Unknown operation {line['key']}")
        if pull_request:
            number = 1 + sum(name.startswith("refs/pr/") for name in content["branches"])
            content["branches"][f"refs/pr/{number}"] = content["branches"][branch]
            branch = f"refs/pr/{number}"
        oid = storage.commit(content, branch, files, header["summary"])
        storage.write(repo, content)
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"}
    if pull_request:
        answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
    self.answer(answer)


@route("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(self: Handler, repo: str, revision: str, path: str) -> None:
    content = self.repository(repo)
    oid = self.revision(content, revision)
    entry = content["commits"][oid]["files"].get(path)
    if entry is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
    headers = {"X-Repo-Commit": oid, "ETag": f'"{entry["git"]}"', "Accept-Ranges": "bytes"}
    if entry["lfs"]:
        headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["oid"]}"'}
        # Another host name, so that the client must not send its token along.
        address = f"http://localhost:{self.server.server_address[1]}/storage/{entry['oid']}"
        self.answer(b"", 302, {**headers, "Location": f"{address}?signature={sign(entry['oid'])}"})
        return
    send_range(self, self.server.storage.blob(entry["oid"]), headers)


@route("GET", r"/storage/(?P<oid>[0-9a-f]{64})")
def fetch(self: Handler, oid: str) -> None:
    if self.query.get("signature") != sign(oid):
        raise Refusal(403, "The address is not signed")
    send_range(self, self.server.storage.blob(oid), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def send_range(self: Handler, file: Path, headers: dict[str, str]) -> None:
    data = file.read_bytes()
    match = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if not match:
        self.answer(data, headers=headers)
        return
    first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
    if first >= len(data):
        raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
    self.answer(data[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


if __name__ == "__main__":
    server = HubServer(Path(sys.argv[1]), int(sys.argv[2]))
    for fault in json.loads(os.environ.get("HUB_FAULTS", "[]")):
        server.fail(**fault)
    print(server.url, flush=True)
    server.serve_forever()
