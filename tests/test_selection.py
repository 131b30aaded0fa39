"""Globs over tensor names."""

import pytest

from fishertool.errors import UsageError
from fishertool.selection import select

NAMES = ["model.embed", "model.layers.0.q", "model.layers.0.norm", "model.layers.1.q", "head[0]"]


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        ([], [], [0, 1, 2, 3, 4]),
        (["*"], [], [0, 1, 2, 3, 4]),
        (["*.q"], [], [1, 3]),
        (["*.1.*", "*embed"], [], [0, 3]),
        ([], ["*.q", "*norm"], [0, 4]),
        (["model.layers.*"], ["*.0.*"], [3]),
        (["model.layers.?.q"], [], [1, 3]),
        (["*.[1-9].q"], [], [3]),
        (["model.embed"], [], [0]),
        (["head[[]0]"], [], [4]),
        (["*.q", "*.0.*"], [], [1, 2, 3]),
    ],
)
def test_selects_in_the_order_of_the_names(
    include: list[str], exclude: list[str], wanted: list[int]
) -> None:
    assert select(NAMES, include, exclude) == [NAMES[index] for index in wanted]
    assert select(iter(NAMES), include, exclude) == [NAMES[index] for index in wanted]


@pytest.mark.parametrize("glob", ["*.k", "embed", "MODEL.*", "head[0]", ""])
@pytest.mark.parametrize("flag", ["--include", "--exclude"])
def test_a_glob_that_matches_nothing_is_an_error(flag: str, glob: str) -> None:
    globs = ["*.q", glob]
    arguments = {"include" if flag == "--include" else "exclude": globs}
    with pytest.raises(UsageError) as caught:
        select(NAMES, **arguments)
    assert str(caught.value).startswith(f"{flag} {glob!r} matches none of 5 tensors (model.embed,")


def test_leaving_nothing_is_an_error() -> None:
    for include, exclude in ((["*.q"], ["model.*"]), ([], ["*"])):
        with pytest.raises(UsageError, match="--include and --exclude leave no tensor"):
            select(NAMES, include, exclude)
    with pytest.raises(UsageError):
        select([])
