"""A model hub on loopback, in the real hub's own layout: clients reach it through HF_ENDPOINT and notice no
difference."""

import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet", ".gz")  # the hub keeps these outside git and redirects to them
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class File:
    """One file of a repository, with the digests that the hub's headers and listings hold."""

    def __init__(self, folder: Path, path: Path):
        self.path, self.name = path, path.relative_to(folder).as_posix()
        self.large = path.suffix in LARGE

    @cached_property
    def content(self) -> bytes:
        return self.path.read_bytes()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def listing(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": self.name, "size": len(self.content), "oid": self.blob}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return entry


@dataclass
class Failure:
    """What goes wrong with requests.

    kind: an HTTP status ("500"), or "reset" (the connection, before an answer), "silent" (no answer for as long as the
    client stays), "stall" (the same after half of the content), "cut" (closed after half of it), "short" (half of it,
    declared as all), "alter" (sky becomes sea, or else one byte another: it can still be read), "html" (a page instead,
    as from a hotel's portal).
    where: a regular expression found in "GET /path". times: how many of those requests fail. after: how many go well
    first.
    """

    kind: str
    where: str = ""
    times: int = 1_000_000
    after: int = 0
    seen: int = 0

    def hits(self, request: str) -> bool:
        if not re.search(self.where, request):
            return False
        self.seen += 1
        return self.after < self.seen <= self.after + self.times


@dataclass
class Repo:
    """A repository: its revisions by name, commits included, and the files at each commit."""

    gated: bool = False
    commits: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, File]] = field(default_factory=dict)


class Hub:
    """A running hub. `add` puts a folder at a repository's revision; `requests` records what clients asked for."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.failing = 0  # an HTTP status to answer everything with
        self.failures: list[Failure] = []
        self.failed = 0  # how many requests were made to fail
        self.move: tuple[str, dict[str, str], str, str] | None = None
        self.closing = threading.Event()
        hub = self

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, kind: str, repo: str, revision: str, folder: Path, gated: bool = False) -> str:
        """Serves `folder` as `repo` (kind: models or datasets) at `revision`; gives the commit."""
        files = {
            file.name: file
            for file in (File(folder, path) for path in sorted(folder.rglob("*")))
            if file.path.is_file()
        }
        digest = hashlib.sha1("".join(f"{name} {file.blob}\n" for name, file in files.items()).encode()).hexdigest()
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else digest
        entry = self.repos.setdefault((kind, repo), Repo(gated))
        entry.commits |= {revision: commit, commit: commit}
        entry.commits.setdefault("main", commit)
        entry.files[commit] = files
        return commit

    def rename(self, kind: str, repo: str, commit: str, old: str, new: str) -> None:
        """Gives a file a name that no file of a folder could have."""
        files = self.repos[kind, repo].files[commit]
        files[new] = files.pop(old)
        files[new].name = new

    def move_after(self, kind: str, repo: str, branch: str, request: str, commit: str) -> None:
        """Has a branch point to another commit from the first request on that this is part of."""
        self.move = request, self.repos[kind, repo].commits, branch, commit

    def fail(self, *failures: Failure) -> None:
        """Has requests fail in these ways; none: the hub is well again."""
        self.failures, self.failed = list(failures), 0

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")

    def _answer(self, body: bytes = b"") -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        self.failure = next((failure.kind for failure in self.hub.failures if failure.hits(request)), "")
        self.hub.failed += bool(self.failure)
        if self.hub.move and self.hub.move[0] in path:
            _, commits, branch, commit = self.hub.move
            commits[branch] = commit
        if self.failure == "reset":
            return self._reset()
        if self.failure == "silent":
            return self._wait()
        if self.failure == "html":
            return self._send(200, b"<html>Please pay</html>", {"Content-Type": "text/html"})
        if self.hub.failing or self.failure.isdecimal():
            return self._send(self.hub.failing or int(self.failure), b"{}")
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            return self._send_content(self._by_digest(match[1]))
        if match := API.fullmatch(path):
            kind, name, action, revision, below = match.groups()
        elif match := RESOLVE.fullmatch(path):
            kind, name, action = "datasets" if match[1] else "models", match[2], "resolve"
            revision, below = match[3], unquote(match[4])
        else:
            return self._refuse(404, "RepoNotFound")
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        if repo.gated and action in ("resolve", None):
            return self._refuse(401, "GatedRepo")
        commit = repo.commits.get(unquote(revision or "main"))
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if action == "resolve":
            return self._resolve(repo.files[commit].get(below), commit)
        if action == "tree":
            return self._tree(repo.files[commit], unquote(below or ""), "recursive=true" in self.path.lower())
        if action == "paths-info":
            return self._paths_info(repo.files[commit], body)
        siblings = [{"rfilename": file} for file in repo.files[commit]]
        return self._send_json({"id": name, "sha": commit, "private": False, "gated": False, "siblings": siblings})

    def _resolve(self, file: File | None, commit: str) -> None:
        if file is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if not file.large:
            return self._send_content(file, {"X-Repo-Commit": commit, "ETag": f'"{file.blob}"'})
        linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        content = self.hub.url.replace("127.0.0.1", "localhost")  # another host, as on the real hub: clients mind that
        return self._send(302, b"", {"X-Repo-Commit": commit, "Location": f"{content}/cdn/{file.sha256}", **linked})

    def _tree(self, files: dict[str, File], below: str, recursive: bool) -> None:
        prefix = f"{below}/" if below else ""
        inside = {name: file for name, file in files.items() if name.startswith(prefix)}
        if not inside:
            return self._refuse(404, "EntryNotFound")
        folders = {name.rpartition("/")[0] for name in inside} - {below, ""}
        entries = [_folder(name) for name in sorted(folders) if recursive or "/" not in name.removeprefix(prefix)]
        entries += [
            file.listing() for name, file in inside.items() if recursive or "/" not in name.removeprefix(prefix)
        ]
        return self._send_json(entries)

    def _paths_info(self, files: dict[str, File], body: bytes) -> None:
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(body)["paths"]
        else:
            wanted = parse_qs(body.decode())["paths"]
        entries = [files[name].listing() for name in wanted if name in files]
        entries += [_folder(name) for name in wanted if any(file.startswith(f"{name}/") for file in files)]
        self._send_json(entries)

    def _by_digest(self, digest: str) -> File:
        files = (file for repo in self.hub.repos.values() for tree in repo.files.values() for file in tree.values())
        return next(file for file in files if file.large and file.sha256 == digest)

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_content(self, file: File, headers: dict[str, str] | None = None) -> None:
        headers = {"ETag": f'"{file.sha256}"', "Accept-Ranges": "bytes", **(headers or {})}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not span:
            return self._send(200, file.content, headers)
        first, size = int(span[1]), len(file.content)
        last = min(int(span[2] or size - 1), size - 1)
        return self._send(
            206, file.content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}
        )

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        half = len(content) // 2
        if self.failure == "alter":
            changed = content.replace(b"sky", b"sea")
            if changed == content != b"":
                changed = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
            content = changed
        if self.failure == "short":
            content = content[:half]
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failure in ("stall", "cut"):
            self.wfile.write(content[:half])
            return self._wait() if self.failure == "stall" else self._close()
        self.wfile.write(content)

    def _wait(self) -> None:
        """Until the client gives up or the hub is closed."""
        self.wfile.flush()
        self.connection.settimeout(0.1)
        while not self.hub.closing.is_set():
            try:
                if not self.connection.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        self._close()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close()

    def _close(self) -> None:
        self.close_connection = True
        self.connection.close()


def _folder(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
