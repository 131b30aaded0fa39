"""Methods found by file name, their settings by signature."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from fishertool.errors import UsageError
from fishertool.registry import Method, find_method, method_names, suggest

PACKAGES = ["fishertool.merging"]
ALL = [(package, name) for package in PACKAGES for name in method_names(package)]

SLOW_ROAST = '''
from typing import Literal

def slow_roast(models, weights, base=None, *, hot: bool = False, turns: int = 2,
               hours: float = 1.5, wood: Literal["oak", "ash"] = "oak", name: str = "x",
               rest: float | None = None, limit: int | None = 3):
    """Cook it.

    Slowly. Source: grandmother.
    """
    return hot, turns, hours, wood, name, rest, limit
'''
PAIR = '''
from collections.abc import Sequence

PerModel = float | Sequence[float]

def pair(models: tuple[str, str], weights, whole, *, share: PerModel = 0.5, lambda_: float = 1.0):
    """Cook two."""
    return whole, share, lambda_

def whole(weights, elements, *, share: PerModel = 0.5):
    return elements, share
'''


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of methods; importing `broken` fails, so listing must not import."""
    folder = tmp_path / "house_of_methods" / "cooking"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for file, text in {
        "__init__.py": '"""Methods."""',
        "method.py": "def method(models): ...",
        "slow_roast.py": SLOW_ROAST,
        "pair.py": PAIR,
        "broken.py": "raise RuntimeError",
        "notes.txt": "",
    }.items():
        (folder / file).write_text(text, encoding="utf-8")
    (folder / "tools").mkdir()
    (folder / "tools" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return "house_of_methods.cooking"


@pytest.fixture
def roast(kitchen: str) -> Method:
    return find_method(kitchen, "slow-roast")


def test_a_method_is_a_file(kitchen: str) -> None:
    assert method_names(kitchen) == ["broken", "pair", "slow-roast"]
    assert {"fisher", "linear", "task-arithmetic"} <= set(method_names("fishertool.merging"))


def test_the_signature_is_the_schema(roast: Method) -> None:
    assert (roast.name, roast.summary) == ("slow-roast", "Cook it.")
    assert roast.inputs == {"models": True, "weights": True, "base": False}
    assert list(roast.settings) == ["hot", "turns", "hours", "wood", "name", "rest", "limit"]
    assert roast.function(None, None, **roast.parse({})) == (False, 2, 1.5, "oak", "x", None, 3)


def test_a_method_may_look_at_the_whole_tensor_and_fix_its_models(
    kitchen: str, roast: Method
) -> None:
    pair = find_method(kitchen, "pair")
    assert pair.whole is not None and pair.whole([], 7, share=0.1) == (7, 0.1)
    assert (pair.inputs["whole"], pair.models) == (True, 2)
    assert (roast.whole, roast.models) == (None, None)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (0.25, 0.25),
        ("0.25", 0.25),
        ("0.1,0.2", [0.1, 0.2]),
        ([0.1, "0.2"], [0.1, 0.2]),
        ((1, 2, 3), [1.0, 2.0, 3.0]),
        ([0.5], 0.5),
    ],
)
def test_a_setting_may_be_one_number_a_model(kitchen: str, given: Any, wanted: Any) -> None:
    pair = find_method(kitchen, "pair")
    assert pair.parse({"share": given})["share"] == wanted


@pytest.mark.parametrize("given", ["a", "0.1,b", [0.1, None], None, [[0.1], 0.2]])
def test_what_is_no_number_a_model_is_refused(kitchen: str, given: Any) -> None:
    with pytest.raises(UsageError, match=r"^pair share: .* is not a float"):
        find_method(kitchen, "pair").parse({"share": given})


def test_lambda_is_set_by_its_name(kitchen: str) -> None:
    pair = find_method(kitchen, "pair")
    assert pair.parse({"lambda": "2"})["lambda_"] == 2.0
    with pytest.raises(UsageError, match="no setting 'lambda_'; did you mean 'lambda'"):
        pair.parse({"lambda_": 2.0})


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("hot", "true", True),
        ("hot", "False", False),
        ("hot", True, True),
        ("hot", 1.0, True),
        ("hot", 0, False),
        ("turns", "7", 7),
        ("turns", -1, -1),
        ("turns", 9999.0, 9999),
        ("hours", "2", 2.0),
        ("hours", 2, 2.0),
        ("hours", "1e-6", 1e-6),
        ("wood", "ash", "ash"),
        ("name", "none", "none"),
        ("rest", "0.5", 0.5),
        ("rest", "none", None),
        ("rest", None, None),
        ("limit", "4", 4),
        ("limit", "none", None),
    ],
)
def test_settings_are_converted_by_their_annotation(
    roast: Method, name: str, given: Any, wanted: Any
) -> None:
    parsed = roast.parse({name: given})
    assert parsed[name] == wanted and type(parsed[name]) is type(wanted)
    assert {**parsed, name: None} == {**roast.settings, name: None}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("hot", "yes"),
        ("hot", 2),
        ("hot", 0.5),
        ("hot", [1]),
        ("turns", "2.5"),
        ("turns", 2.5),
        ("turns", float("inf")),
        ("turns", "many"),
        ("turns", None),
        ("turns", True),
        ("hours", True),
        ("hours", "long"),
        ("hours", None),
        ("hours", [1.0]),
        ("wood", "pine"),
        ("wood", "Oak"),
        ("wood", None),
        ("rest", "never"),
        ("limit", "3.0"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(roast: Method, name: str, given: Any) -> None:
    with pytest.raises(UsageError, match=f"^slow-roast {name}: ") as caught:
        roast.parse({name: given})
    assert repr(given) in str(caught.value) and "\n" not in str(caught.value)


def test_a_literal_names_its_words(roast: Method) -> None:
    with pytest.raises(UsageError, match="'pine' is not one of oak, ash"):
        roast.parse({"wood": "pine"})


def test_unknown_settings_and_methods_get_a_suggestion(kitchen: str, roast: Method) -> None:
    with pytest.raises(UsageError, match="method slow-roast has no setting 'hour'; did you mean"):
        roast.parse({"hour": 1})
    with pytest.raises(UsageError, match="no setting 'zzz'; known: hot, turns, hours"):
        roast.parse({"zzz": 1})
    with pytest.raises(UsageError, match="no method 'slow-roats'; did you mean 'slow-roast'"):
        find_method(kitchen, "slow-roats")
    with pytest.raises(UsageError, match="no method 'fsher'; did you mean 'fisher'"):
        find_method("fishertool.merging", "fsher")


@pytest.mark.parametrize(
    "name", ["method", "__init__", "notes", "", "../linear", "models", "tools"]
)
def test_what_is_no_method_is_not_found(kitchen: str, name: str) -> None:
    for package in (kitchen, "fishertool.merging"):
        with pytest.raises(UsageError, match="no method"):
            find_method(package, name)


def test_suggest_without_anything_known() -> None:
    assert suggest("x", []) == "'x'; known: none"


@pytest.mark.parametrize(("package", "name"), ALL)
def test_every_method_documents_itself(package: str, name: str) -> None:
    method = find_method(package, name)
    text = inspect.getdoc(method.function) or ""
    assert method.summary.endswith(".") and text.isascii()
    assert "Source:" in text and "Shapes:" in text
    for setting in method.settings:
        called = setting.removesuffix("_")
        assert f"`{called}`" in text, f"{name} does not document `{called}`"
    assert set(method.parse({})) == set(method.settings)
    assert method.inputs["models"] and method.function.__module__.endswith(method.function.__name__)
