"""A model id or a folder -> a folder, against a Hub on the loopback interface."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

from fishertool import hub
from fishertool.calibration.data import DataOptions
from fishertool.calibration.rows import read_rows
from fishertool.errors import HubError, InputError

COMMITS = {
    "main": "a" * 40, "v1": "b" * 40, "refs/pr/1": "c" * 40, "portal": "d" * 40, "broken": "e" * 40,
}  # fmt: skip


def content(commit: str, file: str) -> bytes:
    return json.dumps({"commit": commit[0], "file": file}).encode()


class Handler(BaseHTTPRequestHandler):
    """One repository, org/model, whose files tell which revision they are of."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.replace("%2F", "/").partition("?")[0]
        listing = re.fullmatch(r"/api/models/org/model(?:/revision|/tree)/(.+)", path)
        file = re.fullmatch(r"/org/model/resolve/(.+)/([^/]+)", path)
        match = listing or file
        asked = match[1] if match else ""
        commit = COMMITS.get(asked, asked if asked in COMMITS.values() else "")
        files = ["config.json", "adapter_config.json", "train.py", "weights.bin"]
        if not commit:
            self.send_response(404)
            code = "RevisionNotFound" if match else "RepoNotFound"
            self.send_header("X-Error-Code", code)
            self.end_headers()
            return
        if asked == "broken":
            self.close_connection = True
            return
        if asked == "portal":
            sent = b"<html>Log in to this network</html>"
        elif listing and "/tree/" in path:
            entries = [{"type": "file", "path": one, "oid": "0" * 40, "size": 9} for one in files]
            sent = json.dumps(entries).encode()
        elif listing:
            siblings = [{"rfilename": one} for one in files]
            sent = json.dumps({"id": "org/model", "sha": commit, "siblings": siblings}).encode()
        else:
            sent = content(commit, file[2] if file else "")
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent)))
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha1(sent).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(sent)

    def log_request(self, *arguments: object) -> None:
        pass


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("source", "commit"),
    [
        ("org/model", "a"),
        ("org/model@main", "a"),
        ("org/model@v1", "b"),
        ("org/model@refs/pr/1", "c"),
        (f"org/model@{'b' * 40}", "b"),
    ],
)
def test_a_revision_is_fetched(loopback: None, source: str, commit: str) -> None:
    folder = hub.resolve(source)
    assert folder.name == commit * 40
    assert json.loads((folder / "config.json").read_text())["commit"] == commit
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "config.json"]


def test_a_log_has_no_bars_of_the_hub(loopback: None, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        hub.resolve("org/model@v1")
        assert are_progress_bars_disabled() and capsys.readouterr().err == ""
    finally:
        enable_progress_bars()


def test_a_dataset_that_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise Exception("All connection\nattempts failed")

    monkeypatch.setattr("datasets.load_dataset", failing)
    told = (
        "org/data: no such file here, and not fetched from the Hub: All connection attempts failed"
    )
    with pytest.raises(HubError, match=re.escape(told)):
        read_rows(DataOptions("org/data"))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("org/model@v2", "Revision Not Found"),
        ("org/other", "make sure you are authenticated"),
        ("org/model@portal", "Expecting value"),
        ("org/model@broken", "Server disconnected"),
    ],
)
def test_what_is_not_fetched(loopback: None, source: str, told: str) -> None:
    with pytest.raises(
        HubError, match=re.escape(f"{source}: no such folder here, and not fetched")
    ) as raised:
        hub.resolve(source)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/model@v1").mkdir(parents=True)
    assert hub.resolve("org/model@v1") == Path("org/model@v1")


@pytest.mark.parametrize(
    "source",
    ["a", "./org/model", "../model", "a/b/c", "org/model@", "org/a+b", "~/x", "org/mo..del"],
)
def test_what_is_no_name_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="not a Hub id"):
        hub.resolve(source)


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("---\nlicense: mit\n---\nText.\n", "mit"),
        ("Text.\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: {\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_of_a_card_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str | None, told: str | None
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = COMMITS["v1"]
    snapshot = tmp_path / "models--org--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    if card is not None:
        (snapshot / "README.md").write_text(card)
    assert hub.cached_license(f"org/model@{commit}") == told
    assert hub.cached_license("model-a") is None


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="is a file; give the folder"):
        hub.resolve(str(tmp_path / "model.safetensors"))
