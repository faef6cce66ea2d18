"""A Hugging Face Hub on 127.0.0.1, to test downloads without a network.

The libraries read their settings when they are imported, and by then conftest.py has put them
offline. So whatever is to meet this Hub must be a process of its own:
`subprocess.run(command, env=hub.environment(cache), timeout=120)`.
"""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ADDRESS = re.compile(r"(?:/api/models)?/(.+?)(?:/(tree|revision|resolve)/[^/]+(?:/(.+))?)?")


class FakeHub:
    """`with FakeHub({"owner/name": folder}) as hub:` serves each folder as a repository."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.downloads = []  # "owner/name/file" for each file whose bytes were asked for
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: Path, **changes: str) -> dict[str, str]:
        """Variables for a process that shall know no other Hub, nor another cache than this one."""
        kept = {key: text for key, text in os.environ.items() if not key.startswith("HF_")}
        # large files would come by the Xet protocol, and whatever else through a proxy
        ours = {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return kept | ours | {"HF_ENDPOINT": self.url, "HF_HOME": str(cache)} | changes


class Handler(BaseHTTPRequestHandler):
    """Answers what `model_info`, `list_repo_files` and `snapshot_download` ask, and no more."""

    def do_GET(self) -> None:
        address = ADDRESS.fullmatch(unquote(urlsplit(self.path).path))
        name, verb, wanted = address.groups() if address else ("", None, None)
        if name not in self.hub.repositories:
            return self.answer(404, b"", error="RepoNotFound")
        folder, commit = self.hub.repositories[name], hashlib.sha1(name.encode()).hexdigest()
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        if verb == "resolve":
            if wanted not in files:
                return self.answer(404, b"", error="EntryNotFound", commit=commit)
            if self.command == "GET":
                self.hub.downloads.append(f"{name}/{wanted}")
            return self.answer(200, files[wanted].read_bytes(), commit=commit)
        reply = {"id": name, "sha": commit, "siblings": [{"rfilename": each} for each in files]}
        if verb == "tree":
            sizes = [(each, path.stat().st_size) for each, path in files.items()]
            reply = [dict(type="file", path=each, size=size, oid=commit) for each, size in sizes]
        return self.answer(200, json.dumps(reply).encode(), commit=commit)

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, error: str = "", commit: str = "") -> None:
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.send_response(status)
        for key, text in (("ETag", etag), ("X-Repo-Commit", commit), ("X-Error-Code", error)):
            self.send_header(key, text)
        self.send_header("X-HF-Warning", "login; You send unauthenticated requests to the Hub.")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    def log_message(self, *_) -> None:
        """Nothing: a test's output is no access log."""
