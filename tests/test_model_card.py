"""The model card: its text, held against a file; and what it says of making the output again."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cli, Estimate, ModelMaker

from fishertool.checkpoint.json_files import load_json
from fishertool.model_card import Subject, model_card

GOLDEN = Path(__file__).parent / "golden/model_card.md"
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}
LOW_RANK = CLASSIFIER | {"quantization_config": {"quant_method": "low_rank"}}


def made_of(command: str, *inputs: tuple[str, str], **more: Any) -> dict[str, Any]:
    """A report as the verb would write it."""
    files = [{"file": "model.safetensors", "bytes": 1200, "sha256": "0f" * 32}]
    return {
        "schema": "fishertool.report/1",
        "command": command,
        "options": {},
        "inputs": [{"id": name, "role": role, "files": files} for role, name in inputs],
        "summary": {"method": "ties"},
        "environment": {"versions": {"fishertool": "0.1.0"}},
    } | more


REPORT = made_of(
    "merge",
    ("model", "org/french@v2"),
    ("model", "local"),
    ("base", "org/base"),
    ("data", "a.jsonl"),
    options={
        "out": "merged",
        "weights": None,
        "search_weights": "grid",
        "recipe": {
            "merge_method": "ties",
            "models": [{"model": "org/french@v2"}, {"model": "local"}],
            "base_model": "org/base",
        },
    },
    calibration={"examples": 1000, "tokens": 20000},
    summary={"method": "ties", "weights": [0.25, 0.75], "rules": {}, "parameters": 5715},
    evaluation={"metrics": {"accuracy": 0.875, "loss": 0.5}, "against": {"accuracy": 0.5}},
)


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_the_text() -> None:
    subject = Subject("org/merged", "model", CLASSIFIER, license="apache-2.0")
    assert model_card(subject, REPORT) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "command", "config", "told", "code"),
    [
        ("model", "prune", CLASSIFIER, ("finetune", "transformers", "text-classification"), None),
        (
            "model", "factorize", LOW_RANK, ("finetune", "transformers", "text-classification"),
            "import fishertool",
        ),
        (
            "adapter", "merge", {"base_model_name_or_path": "org/base"},
            ("adapter", "peft", None), "PeftModel.from_pretrained",
        ),
        (
            "sentence-transformers", "merge", {"architectures": ["BertModel"]},
            ("merge", "sentence-transformers", "sentence-similarity"), "SentenceTransformer(",
        ),
        ("sidecar", "estimate-fisher", {}, (None, "fishertool", None), "--fisher org/out"),
        (
            "model", "densify", {"architectures": ["GPT2LMHeadModel"]},
            ("finetune", "transformers", "text-generation"), "AutoModelForCausalLM",
        ),
    ],
)  # fmt: skip
def test_what_the_hub_is_told(
    kind: str,
    command: str,
    config: dict[str, Any],
    told: tuple[str | None, ...],
    code: str | None,
) -> None:
    report = made_of(command, ("model", "org/one"), ("base", "org/base"), ("model", "local"))
    text = model_card(Subject("org/out", kind, config), report)
    found = front_matter(text)
    keys = ("base_model_relation", "library_name", "pipeline_tag")
    assert tuple(found.get(key) for key in keys) == told
    assert found.get("base_model") == (None if kind == "sidecar" else ["org/base", "org/one"])
    assert {"fishertool", command, "ties"} <= set(found["tags"])
    assert (code or "from_pretrained") in text
    assert ("import fishertool" in text) == (config is LOW_RANK)


def test_without_a_report() -> None:
    text = model_card(Subject("org/out", "model", {}), None)
    assert "How it was made is not recorded." in text and "again" not in text
    assert front_matter(text) == {"library_name": "transformers", "tags": ["fishertool"]}


@pytest.mark.parametrize(
    "line",
    [
        "merge a b --base base --method ties --set density=0.5",
        "merge a b --method fisher --fisher fisher-a --fisher fisher-b --weights 0.3,0.7",
        "merge a b --max-shard-size 9KB --search-weights grid --search-points 3 --evaluate-on data.jsonl",
        "merge a b --base base --method task-arithmetic --as-lora 2",
        "factorize a --method kronecker --fisher fisher-a --keep 0.5 --evaluate-on data.jsonl",
        "prune a --method obs --sparsity 0.5 --data data.jsonl --compensate summed --save-mask",
        "prune a --method magnitude --pattern neurons --sparsity 0.5 --data data.jsonl",
        "estimate-fisher a --data data.jsonl --kind diagonal,factored --labels empirical",
        "densify low",
    ],
)
def test_what_is_told_makes_it_again(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, line: str
) -> None:
    for seed, name in enumerate(("a", "b", "base")):
        make_model(name, seed=seed)
    for name in ("a", "b"):
        if f"fisher-{name}" in line:
            estimated(Path(name).resolve())
    if line == "densify low":
        low = ("factorize", "a", "--method", "svd", "--keep", "0.5", "--out", "low", "-q")
        assert cli(*low).code == 0
    first = ["first"] if line == "densify low" else ["--out", "first"]
    result = cli(*line.split(), *first, "-q")
    assert result.code == 0, result.err
    text = model_card(
        Subject("org/x", "model", {}), load_json(Path("first/fishertool_report.json"))
    )
    if again := re.search(r"```yaml\n(.*?)```", text, re.DOTALL):
        Path("again.yml").write_text(again[1])
    told = re.findall(r"```bash\n(fishertool .*?)\n```", text)[-1]
    result = cli(*shlex.split(told.replace("OUT", "second"))[1:], "-q")
    assert result.code == 0, f"{told}: {result.err}"
    for path in Path("first").glob("*.safetensors"):
        assert Path("second", path.name).read_bytes() == path.read_bytes()
