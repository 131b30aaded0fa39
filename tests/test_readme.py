"""Every shell block of the README and every file in configs/ runs."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cli, ModelMaker, make_text, write_rows

ROOT = Path(__file__).parent.parent
COMMANDS = [
    command
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for command in block.replace("\\\n", " ").strip().splitlines()
]


@pytest.fixture
def stage(cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path) -> Callable[[], None]:
    """The models and data that the README and the configs speak of."""

    def prepare() -> None:
        make_model("model-a", seed=1)
        make_model("model-b", seed=2)
        make_model("base", seed=3)
        for name in ("a", "b"):
            (tmp_path / f"{name}.jsonl").write_bytes(data.read_bytes())
        make_model("embedder", head="Model")
        pairs = [{"query": make_text(n, 2), "positive": make_text(n, 5)} for n in range(9)]
        write_rows(tmp_path / "pairs.jsonl", pairs)

    return prepare


def test_readme_has_a_command_for_every_verb() -> None:
    assert {shlex.split(command)[1] for command in COMMANDS} == {
        "estimate-fisher", "combine-fisher", "merge", "factorize", "densify", "prune", "evaluate",
        "search", "inspect", "verify", "push",
    }  # fmt: skip


def test_readme_commands_run_in_order(cli: Cli, stage: Callable[[], None]) -> None:
    stage()
    for command in COMMANDS:
        program, *arguments = shlex.split(command.replace("configs/", f"{ROOT}/configs/"))
        assert program == "fishertool"
        result = cli(*arguments)
        assert result.code == 0, f"{command}: {result.err}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yml")), ids=lambda path: path.name
)
def test_configs_run_as_their_first_line_says(
    cli: Cli, stage: Callable[[], None], path: Path
) -> None:
    stage()
    for name in ("a", "b"):
        flags = ("--data", "a.jsonl", "--out", f"fisher-{name}", "-q")
        assert cli("estimate-fisher", f"model-{name}", *flags).code == 0
    assert cli("merge", "model-a", "model-b", "--out", "merged", "-q").code == 0
    line = path.read_text().splitlines()[0]
    arguments = shlex.split(line[line.index("fishertool") :])[1:]
    place = arguments.index(f"configs/{path.name}")
    arguments[place] = str(path)
    overwrite = [] if arguments[0] == "evaluate" else ["--overwrite"]
    result = cli(*arguments, *overwrite)
    assert result.code == 0, result.err
