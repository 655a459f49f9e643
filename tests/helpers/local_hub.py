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
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import yaml
from hub_server import READER, USERS, WRITER, Handler, HubServer, Refusal, Storage, route

__all__ = ["READER", "USERS", "WRITER", "HubServer", "Refusal", "keep"]
LFS_FROM = 2**16  # bytes; smaller files are part of the commit, as on the Hub, except weights
MULTIPART_FROM, PART = 2**18, 2**17
LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "openrail", "llama3", "gemma", "other", "unknown")
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


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
