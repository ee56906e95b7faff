"""A Hugging Face hub on this machine: as much of its HTTP interface as huggingface_hub needs to fetch models.

As on the real one, weights are redirected to another host, and names from before owners to those of today.
"""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


class Hub:
    """Repositories by name, and what is wrong with this hub.

    Attributes:
        repos: name -> file name -> content.
        renamed: name of old -> name.
        instead: file name -> what is sent in place of its content.
        sent: names of the files that were sent.
    """

    def __init__(self, repos: Mapping[str, Mapping[str, bytes]], renamed: Mapping[str, str]) -> None:
        self.repos, self.renamed = repos, renamed
        self.commit = COMMIT
        self.instead: dict[str, bytes] = {}
        self.sent: list[str] = []

    def entry(self, repo: str, name: str) -> dict[str, object]:
        """What the tree of a repository says of a file."""
        data = self.repos[repo][name]
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
        if name.endswith(LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
        return entry


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        for old, new in self.hub.renamed.items():
            for before in ("api/models/", ""):
                if path == before + old or path.startswith(f"{before}{old}/"):
                    return self.redirect(f"/{before}{new}{path.removeprefix(before + old)}", 307)
        if path.startswith("api/models/"):
            return self.api(path.removeprefix("api/models/"))
        if path.startswith("large/"):
            repo, _, name = path.removeprefix("large/").rpartition("/")
            return self.send(self.hub.instead.get(name, self.hub.repos[repo][name]), {}, name)
        repo, _, rest = path.partition("/resolve/")
        return self.resolve(repo, rest.partition("/")[2])

    do_HEAD = do_GET  # noqa: N815 - the name is http.server's

    def api(self, path: str) -> None:
        repo = next((repo for repo in self.hub.repos if path == repo or path.startswith(f"{repo}/")), None)
        if repo is None:
            return self.fail("RepoNotFound")
        if path == repo:
            siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
            return self.send(json.dumps({"id": repo, "sha": self.hub.commit, "siblings": siblings}).encode(), {})
        assert path == f"{repo}/tree/{self.hub.commit}"
        folder = {"type": "directory", "path": "onnx", "oid": "0" * 40, "size": 0}
        return self.send(
            json.dumps([folder, *(self.hub.entry(repo, n) for n in self.hub.repos[repo])]).encode(), {}
        )

    def resolve(self, repo: str, name: str) -> None:
        if repo not in self.hub.repos:
            return self.fail("RepoNotFound")
        headers = {"X-Repo-Commit": self.hub.commit}
        if name not in self.hub.repos[repo]:
            return self.fail("EntryNotFound", headers)
        data = self.hub.repos[repo][name]
        if name.endswith(LARGE):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
            place = f"http://localhost:{self.server.server_address[1]}/large/{repo}/{name}"
            return self.redirect(place, 302, headers)
        return self.send(self.hub.instead.get(name, data), {**headers, "ETag": f'"{git_id(data)}"'}, name)

    def send(self, data: bytes, headers: Mapping[str, str], name: str | None = None) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
            self.hub.sent += [name] if name else []

    def redirect(self, place: str, status: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Location": place, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def fail(self, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(404)
        for key, value in {**(headers or {}), "X-Error-Code": code, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serves a hub within the block; its address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
