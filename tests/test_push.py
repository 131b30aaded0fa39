"""`fishertool push`, through the command line, against a Hub on the loopback interface."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import Cli, Estimate, ModelMaker
from hub_server import TOKEN, Hub, Repo, Stored, running
from huggingface_hub.utils.tqdm import enable_progress_bars
from test_sentence import make_sentence_model

from fishertool.checkpoint.against_report import difference
from fishertool.checkpoint.digest import FileDigest

REPORT = "fishertool_report.json"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
MERGED = {"README.md", "config.json", "model.safetensors", REPORT} | TOKENIZER


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(monkeypatch) as found:
        try:
            yield found
        finally:
            enable_progress_bars()


@pytest.fixture
def merged(cli: Cli, make_model: ModelMaker) -> Path:
    make_model("a", seed=1)
    make_model("b", seed=2)
    assert cli("merge", "a", "b", "--out", "merged", "-q").code == 0
    return Path("merged")


def test_a_new_repository_has_one_commit(cli: Cli, hub: Hub, merged: Path) -> None:
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    result = cli("push", merged, "org/new", "--private", "--message", "first", "--json")
    assert result.code == 0, result.err
    assert hub.repos["org/new"].private
    assert hub.names("org/new") == MERGED
    assert hub.messages == ["first"]
    tree = hub.repos["org/new"].refs["main"]
    assert tree["model.safetensors"].content == before["model.safetensors"]
    assert tree["README.md"].content.startswith(b"---\n")
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before

    report = result.report
    assert report["command"] == "push" and report["status"] == "ok"
    assert report["summary"]["repository"] == f"{hub.address}/org/new"
    assert report["summary"]["created"] and report["summary"]["pull_request"] is None
    assert report["summary"]["commit"].startswith(f"{hub.address}/org/new/commit/")
    told = report["output"]["files"] + report["output"]["companions"]
    assert {one["file"]: one["sha256"] for one in told} == {
        name: sha256(tree[name].content).hexdigest() for name in MERGED
    }
    assert [one["file"] for one in report["output"]["files"]] == ["model.safetensors"]
    assert report["output"]["dtype"] == "float32" and report["output"]["parameters"] > 0
    assert [one["role"] for one in report["inputs"]] == ["model"]
    assert TOKEN not in result.out + result.err


def test_a_pull_request_where_there_are_files(cli: Cli, hub: Hub, merged: Path) -> None:
    hub.repos["org/old"] = Repo()
    assert cli("push", merged, "org/old", "-q").code == 0  # empty: a commit
    (merged / "NOTICE").write_text("ours")  # added to what was written
    result = cli("push", merged, "org/old", "--json")
    assert result.code == 0, result.err
    assert result.report["summary"]["pull_request"] == f"{hub.address}/org/old/discussions/1"
    assert result.report["summary"]["revision"] == "refs/pr/1"
    refs = hub.repos["org/old"].refs
    assert "NOTICE" in refs["refs/pr/1"] and "NOTICE" not in refs["main"]
    assert hub.messages == ["Output of fishertool merge"] * 2

    result = cli("push", merged, "org/old", "--no-pull-request")
    assert result.code == 0, result.err
    assert refs["main"]["NOTICE"] == refs["refs/pr/1"]["NOTICE"]
    result = cli("push", merged, "org/old", "--no-pull-request")
    assert "org/old: has all of it already; nothing was sent" in result.err
    assert cli("push", merged, "org/fresh", "--pull-request", "-q").code == 0
    assert hub.names("org/fresh") == set()
    assert hub.names("org/fresh", "refs/pr/1") == MERGED | {"NOTICE"}


def test_a_branch_is_made_and_main_stays(cli: Cli, hub: Hub, merged: Path) -> None:
    hub.repos["org/old"] = Repo()
    hub.repos["org/old"].refs["main"]["notes.txt"] = Stored(b"", False)
    for _ in range(2):  # the second finds it there
        assert cli("push", merged, "org/old", "--revision", "next", "-q").code == 0
    assert hub.names("org/old") == {"notes.txt"}
    assert hub.names("org/old", "next") == MERGED | {"notes.txt"}
    assert cli("push", merged, "org/fresh", "--revision", "next", "-q").code == 0
    assert hub.names("org/fresh") == set() and hub.names("org/fresh", "next") == MERGED
    result = cli("push", merged, "org/old", "--revision", "refs/pr/7")
    assert result.code == 6 and "Revision Not Found" in result.err
    result = cli("push", merged, "org/old", "--revision", "next", "--pull-request")
    assert result.code == 2 and "--pull-request is for the main branch" in result.err


def test_old_weights_go_and_other_files_stay(cli: Cli, hub: Hub, merged: Path) -> None:
    hub.repos["org/old"] = Repo()
    tree = hub.repos["org/old"].refs["main"]
    old = {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    for name in old | {"diagonal.safetensors", "README.md", "notes.txt"}:
        tree[name] = Stored(b"old", name.endswith(".safetensors"))
    result = cli("push", merged, "org/old", "--no-pull-request", "--json")
    assert result.code == 0, result.err
    assert set(result.report["summary"]["removed"]) == old
    assert hub.names("org/old") == MERGED | {"diagonal.safetensors", "notes.txt"}
    assert "README.md: the repository has one, which stays; --card FILE replaces it" in result.err
    tree = hub.repos["org/old"].refs["main"]
    assert tree["README.md"].content == b"old"

    Path("card.md").write_text("---\nlicense: mit\n---\nMine.\n")
    result = cli("push", merged, "org/old", "--no-pull-request", "--card", "card.md", "-q")
    assert result.code == 0, result.err
    assert b"Mine." in hub.repos["org/old"].refs["main"]["README.md"].content


def test_the_folders_own_card_and_none(cli: Cli, hub: Hub, merged: Path) -> None:
    (merged / "README.md").write_text("Own.\n")
    assert cli("push", merged, "org/own", "-q").code == 0
    assert hub.repos["org/own"].refs["main"]["README.md"].content == b"Own.\n"
    assert cli("push", merged, "org/none", "--no-card", "-q").code == 0
    assert hub.names("org/none") == MERGED - {"README.md"}
    result = cli("push", merged, "org/none", "--no-card", "--card", "x.md")
    assert result.code == 2 and "exclude each other" in result.err
    result = cli("push", merged, "org/none", "--card", "x.md")
    assert result.code == 2 and "--card x.md: no such file" in result.err
    hub.yaml["errors"] = [{"message": '"license" must be one of a list'}]
    result = cli("push", merged, "org/bad")
    assert result.code == 6 and '"license" must be one of a list' in result.err
    assert "org/bad was made, and has none of the files" in result.err
    hub.yaml = {"warnings": [{"message": "empty or missing yaml metadata"}], "errors": []}
    assert "empty or missing yaml metadata" in cli("push", merged, "org/bad").err


def test_only_what_is_allowed_is_sent(cli: Cli, hub: Hub, merged: Path) -> None:
    refused = ["code.py", "pytorch_model.bin", "optimizer.pt", "a.pkl", "notes.txt", "x.tmp"]
    refused += ["model-00001-of-00002.safetensors", ".env", ".git/config", "logs/a.json"]
    refused += ["logs/additional_chat_templates/a.jinja"]
    (merged / "LICENSE").symlink_to("logs")
    for name in refused:
        (merged / name).parent.mkdir(exist_ok=True, parents=True)
        (merged / name).write_text(TOKEN)
    result = cli("push", merged, "org/new", "--json")
    assert result.code == 0, result.err
    assert hub.names("org/new") == MERGED
    assert set(result.report["output"]["left_out"]) == {*refused, ".git", "LICENSE"} - {
        ".git/config"
    }
    assert "not published: " in result.err
    assert not any(TOKEN.encode() in content for content in hub.lfs.values())


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_modules_of_sentence_transformers(
    cli: Cli, hub: Hub, make_model: ModelMaker, transformer: str
) -> None:
    make_sentence_model(make_model, transformer=transformer).rename("embedder")
    flags = ("--method", "svd", "--keep", "0.5", "--out", "low", "-q")
    assert cli("factorize", "embedder", *flags).code == 0
    result = cli("push", "low", "org/low", "--json")
    assert result.code == 0, result.err
    assert result.report["output"]["left_out"] == []
    names = {
        path.relative_to("low").as_posix() for path in Path("low").rglob("*") if path.is_file()
    }
    assert hub.names("org/low") == names | {"README.md"}
    weights = Path("low", transformer, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    result = cli("push", "low", "org/low")
    assert result.code == 3 and f"{weights.relative_to('low')}: has other bytes" in result.err


def test_sidecars_and_adapters(
    cli: Cli, hub: Hub, make_model: ModelMaker, merged: Path, estimated: Estimate
) -> None:
    folder = estimated(Path("a").resolve())
    result = cli("push", folder, "org/fisher", "--json")
    assert result.code == 0, result.err
    kinds = {f"{kind}.safetensors" for kind in ("diagonal", "factored", "kronecker")}
    assert hub.names("org/fisher") == kinds | {"README.md", REPORT}
    assert result.report["inputs"][0]["role"] == "fisher"
    flags = ("--base", "a", "--method", "task-arithmetic", "--as-lora", "2", "--out", "lora", "-q")
    assert cli("merge", "b", *flags).code == 0
    result = cli("push", "lora", "org/lora")
    assert result.code == 0, result.err
    assert "its base is a, which is no Hub id" in result.err
    assert "adapter_config.json: its base_model_name_or_path names a place" in result.err
    assert str(Path.cwd()) not in result.err
    assert str(Path.cwd()).encode() not in hub.repos["org/lora"].refs["main"]["README.md"].content
    assert "adapter_config.json" in hub.names("org/lora")
    part = ("--data", "data.jsonl", "--part", "1/2", "--out", "part", "-q")
    assert cli("estimate-fisher", "a", *part).code == 0
    result = cli("push", "part", "org/part")
    assert result.code == 3 and "is one part of an estimate" in result.err


def test_what_was_changed_is_refused(cli: Cli, hub: Hub, merged: Path) -> None:
    def refused(told: str) -> None:
        result = cli("push", merged, "org/new")
        assert result.code == 3, result.err
        assert told in result.err
        assert result.err.count("\n") == 1

    weights = merged / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\x7f")
    refused("merged: is not as it was written: model.safetensors: has other bytes")
    weights.write_bytes(whole[:-1])
    refused("truncated")
    weights.write_bytes(whole)
    shutil.copy(weights, merged / "other.safetensors")
    refused(f"other.safetensors: is not in {REPORT}")
    (merged / "other.safetensors").unlink()
    config = (merged / "config.json").read_text()
    (merged / "config.json").write_text(f"{config} ")
    refused("merged: is not as it was written: config.json: has ")
    (merged / "config.json").write_text(config)
    report = json.loads((merged / REPORT).read_text())
    report["output"]["companions"] = [{"file": "config.json"}]
    (merged / REPORT).write_text(json.dumps(report))
    refused(f"{REPORT}: is no report of fishertool")
    report["output"]["companions"] = []
    (merged / REPORT).write_text(json.dumps(report))
    (merged / "tokenizer.json").unlink()
    (merged / "tokenizer.json").symlink_to("/etc/hostname")
    refused("links out of its folder")
    (merged / "tokenizer.json").unlink()
    report = json.loads((merged / REPORT).read_text())
    for wrong in ("x", "[]", "{}", json.dumps(report | {"inputs": [{"id": 3}]})):
        (merged / REPORT).write_text(wrong)
        refused(f"{REPORT}: is no report of fishertool")
    report["output"]["files"][0]["file"] = "../b/model.safetensors"
    (merged / REPORT).write_text(json.dumps(report))
    refused("../b/model.safetensors: is named in its report, and is no file of the folder")
    (merged / "config.json").unlink()
    refused("config.json: missing")
    assert hub.asked == []


def test_a_folder_without_a_report(cli: Cli, hub: Hub, make_model: ModelMaker) -> None:
    folder = make_model("plain", shards="6KB")
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": "/models/of-somebody", "license": "mit"}
    (folder / "config.json").write_text(json.dumps(config))
    result = cli("push", "plain", "org/plain")
    assert result.code == 0, result.err
    assert f"plain: has no {REPORT}, so nothing tells" in result.err
    assert "config.json: its _name_or_path names a place on a machine" in result.err
    assert b"license: mit" in hub.repos["org/plain"].refs["main"]["README.md"].content
    assert "model.safetensors.index.json" in hub.names("org/plain")
    (folder / "model.safetensors.index.json").unlink()
    assert cli("push", "plain", "org/plain").code == 3
    result = cli("push", "nowhere", "org/plain")
    assert result.code == 3 and "nowhere: no such folder" in result.err
    Path("empty").mkdir()
    assert "no model.safetensors in it" in cli("push", "empty", "org/plain").err


@pytest.mark.parametrize(
    "repo", ["name", "a/b/c", "org/a--b", "org/na me", "org/x.git", "org/x@v1"]
)
def test_what_is_no_repository(cli: Cli, repo: str) -> None:
    result = cli("push", "merged", repo)
    assert result.code == 2 and f"{repo}: not a Hub id" in result.err


def test_dry_run_needs_no_network(cli: Cli, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Path("push.yml").write_text("repo: org/new\ndry-run: true\nreport: told.json\n")
    result = cli("push", merged, "--config", "push.yml", "--json")
    assert result.code == 0, result.err
    assert result.report["status"] == "dry-run"
    summary = result.report["summary"]
    assert set(summary["sent"]) == MERGED and summary["bytes"] == sum(summary["sent"].values())
    assert summary["card"].startswith("---\n")
    assert json.loads(Path("told.json").read_text())["command"] == "push"
    result = cli("push", merged, "org/new", "--dry-run")
    assert f"\n{summary['card']}" in result.out and "sent.model.safetensors" in result.out
    assert cli("push", merged, "org/new", "--dry-run", "-q").out == ""


@pytest.mark.parametrize(
    ("request_", "status", "told"),
    [
        ("GET /api/models", 401, "the token is not accepted; run `hf auth login`"),
        ("POST /api/repos/create", 403, "give it the right to write there"),
        ("GET /api/models", 500, "500"),
        ("/commit/", 500, "org/new was made, and has none of the files"),
        ("/commit/", 403, "give it the right to write there"),
        ("/commit/", 412, "the repository changed meanwhile; push again"),
        ("PUT /lfs/", 403, "Error while uploading 'model.safetensors' to the Hub.; "),
        ("/paths-info/", 404, "404"),
    ],
)
def test_what_the_hub_refuses(
    cli: Cli, hub: Hub, merged: Path, request_: str, status: int, told: str
) -> None:
    hub.faults[request_] = (status, f"said with {TOKEN}")
    result = cli("push", merged, "org/new")
    assert result.code == 6
    sent = "/paths-info/" in request_
    how = "sent, but what is at" if sent else "not published: "
    assert f"org/new: {how}" in result.err and told in result.err
    assert result.err.count("\n") == 1 and result.out == ""
    assert TOKEN not in result.err
    if not sent:
        assert all(repo.refs.keys() == {"main"} for repo in hub.repos.values())
        assert not any(hub.names(repo) for repo in hub.repos)


def test_a_commit_whose_answer_was_lost_may_be_there(cli: Cli, hub: Hub, merged: Path) -> None:
    hub.drops = "POST .*/commit/"
    result = cli("push", merged, "org/new")
    assert result.code == 6 and result.err.count("\n") == 1
    told = (
        "org/new: whether it is published is not known, as the connection was lost after the commit"
    )
    assert told in result.err and "not published" not in result.err
    assert f"look at {hub.address}/org/new/commits/main, and push again" in result.err
    assert "org/new was made, and may have none of the files" in result.err
    assert hub.names("org/new") == MERGED
    (merged / "NOTICE").write_text("first")
    result = cli("push", merged, "org/new")
    assert f"look at {hub.address}/org/new/discussions, and push again" in result.err
    hub.drops = "$^"
    hub.faults["/commit/"] = (504, "Gateway Time-out")
    assert "is not known" in cli("push", merged, "org/new", "--no-pull-request").err
    hub.faults.clear()
    hub.drops = "preupload"
    result = cli("push", merged, "org/other")
    assert "org/other: not published: " in result.err
    assert "org/other was made, and has none of the files" in result.err


def test_other_bytes_on_the_hub(cli: Cli, hub: Hub, merged: Path) -> None:
    hub.spoils = True
    result = cli("push", merged, "org/new")
    assert result.code == 6
    assert "the Hub has other bytes than were sent of model.safetensors" in result.err
    assert f"take back {hub.address}/org/new/commit/" in result.err


def test_no_token_no_network_no_private(
    cli: Cli, hub: Hub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/public"] = Repo()
    result = cli("push", merged, "org/public", "--private")
    assert result.code == 2 and "is public, so --private cannot be had" in result.err
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        result = cli("push", merged, "org/public")
        assert result.code == 6 and "the token is not accepted" in result.err
        patch.delenv("HF_TOKEN")
        patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
        asked = len(hub.asked)
        result = cli("push", merged, "org/public")
        assert result.code == 6 and "not logged in to the Hub; run `hf auth login`" in result.err
        assert len(hub.asked) == asked
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    result = cli("push", merged, "org/public")
    assert result.code == 6 and result.err.count("\n") == 1
    assert "http://127.0.0.1:1 is not reached; look at the network" in result.err


def test_an_interrupted_push_leaves_the_branch(
    cli: Cli, hub: Hub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub._commit_api._send_commit", stop)
    result = cli("push", merged, "org/new")
    assert result.code == 130
    assert "the Hub has all of it in one commit, or none" in result.err
    assert hub.names("org/new") == set()


def test_it_starts_without_torch(hub: Hub, merged: Path) -> None:
    code = (
        "import sys; from fishertool.cli import main; code = main(sys.argv[1:]);"
        "loaded = {'torch', 'transformers', 'datasets'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else code)"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, "push", str(merged), "org/new"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.names("org/new") == MERGED
    assert f"{hub.address}/org/new" in done.stdout


def test_difference(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    right = FileDigest("a", 3, sha256(b"abc").hexdigest())
    assert difference(tmp_path, right) is None
    wrong = [
        replace(right, file="b"),
        replace(right, bytes=4),
        replace(right, sha256="0" * 64),
        replace(right, file="/a"),
    ]
    assert [difference(tmp_path, one) for one in wrong] == [
        "b: missing, and its report names it",
        "a: has 3 bytes, and 4 in the report",
        "a: has other bytes than when it was written (SHA-256)",
        "/a: is named in its report, and is no file of the folder",
    ]
    known = FileDigest("a", 3, "0" * 64)
    assert difference(tmp_path, right, known) == difference(tmp_path, wrong[2])
