"""A server with the part of the Hugging Face Hub's API that lists, reads and commits files of one repository."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "user/repo"
COMMIT = "a" * 40
API = f"/api/models/{REPOSITORY}"
CONTENTS = f"/{REPOSITORY}/resolve/main/"


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[str]:
    """Yield the address of a server whose repository holds `files` and changes them."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *values: Any) -> None:  # noqa: A002 (the name of the base class)
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            if path in (API, f"{API}/revision/main"):
                self.answer({"id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "siblings": []})
            elif path.startswith(f"{API}/tree/main"):
                folder = path.removeprefix(f"{API}/tree/main").strip("/")
                is_recursive = parse_qs(url.query).get("recursive", [""])[0].lower() == "true"
                found = entries(files, f"{folder}/" if folder else "", is_recursive)
                self.answer(found) if found else self.missing("EntryNotFound")
            elif (name := path.removeprefix(CONTENTS)) in files:
                first, _, last = self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
                self.answer(files[name][int(first) : int(last) + 1 if last else None])
            else:
                self.missing("EntryNotFound" if path.startswith(CONTENTS) else "RepoNotFound")

        do_HEAD = do_GET  # noqa: N815 (so the base class calls it)

        def do_POST(self) -> None:
            body, path = self.rfile.read(int(self.headers.get("Content-Length", 0))), urlsplit(self.path).path
            if path.startswith(f"{API}/paths-info/"):
                is_json = self.headers["content-type"].startswith("application/json")
                paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
                self.answer([item for name in paths if (item := entry(files, name)) is not None])
            elif path.startswith(f"{API}/preupload/"):
                modes = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                self.answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})
            elif path.startswith(f"{API}/commit/"):
                for line in map(json.loads, body.splitlines()):
                    name = line["value"].get("path", "")
                    if line["key"] == "file":
                        files[name] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        files.pop(name, None)
                address = f"http://{self.headers['Host']}/{REPOSITORY}/commit/{COMMIT}"
                self.answer({"commitUrl": address, "commitOid": COMMIT})
            else:
                self.missing("RepoNotFound")

        def answer(self, value: Any, code: int = 200, **headers: str) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(code)
            for name, text in {
                "Content-Length": str(len(data)),
                "ETag": '"e"',
                "X-Repo-Commit": COMMIT,
                **headers,
            }.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else data)

        def missing(self, reason: str) -> None:
            self.answer({"error": reason}, 404, **{"X-Error-Code": reason})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def entry(files: dict[str, bytes], name: str) -> dict[str, Any] | None:
    if name in files:
        return {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}
    is_folder = any(file.startswith(f"{name}/") for file in files)
    return {"type": "directory", "path": name, "oid": COMMIT} if is_folder else None


def entries(files: dict[str, bytes], prefix: str, is_recursive: bool) -> list[dict[str, Any] | None]:
    names = set()
    for file in files:
        parts = file.removeprefix(prefix).split("/") if file.startswith(prefix) else []
        depths = range(1, (len(parts) if is_recursive else min(1, len(parts))) + 1)
        names |= {prefix + "/".join(parts[:depth]) for depth in depths}
    return [entry(files, name) for name in sorted(names)]
