"""What a recipe's settings are for each tensor, against a slow reading of the definition."""

from fnmatch import fnmatchcase
from typing import Any

import pytest
from recipes import METHODS, TEXTS, PerModel, method_of, recipe_of

from fishertool.errors import UsageError
from fishertool.recipe.flags import from_flags
from fishertool.recipe.inputs import normalised
from fishertool.recipe.resolve import Matches, Resolver

LAYERS = 5
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "norm")
NAMES = [("embed.weight", 0.0)] + [
    (f"layers.{layer}.{part}.weight", layer / (LAYERS - 1))
    for layer in range(LAYERS)
    for part in PARTS
]


def resolver(name: str, text: str | None = None) -> Resolver:
    recipe = recipe_of(TEXTS[name] if text is None else text)
    return Resolver(normalised(recipe, METHODS[name]), METHODS[name])


def models(*parameters: str, method: str = "ties", more: str = "") -> str:
    rows = [
        f"- {{model: m{number}, parameters: {{{given}}}}}\n"
        for number, given in enumerate(parameters)
    ]
    return f"merge_method: {method}\nmodels:\n{''.join(rows)}base_model: base\n{more}"


def line(numbers: list[float], depth: float) -> float:
    place = depth * (len(numbers) - 1)
    return sum(max(0.0, 1 - abs(place - at)) * number for at, number in enumerate(numbers))


def test_slerp_by_attention_and_mlp() -> None:
    resolving = resolver("slerp")
    for name, depth in NAMES:
        wanted = 0.5
        if "self_attn" in name:
            wanted = line([0, 0.5, 0.3, 0.7, 1], depth)
        elif "mlp" in name:
            wanted = line([1, 0.5, 0.7, 0.3, 0], depth)
        weights, settings = resolving.at(0, name, depth)
        assert settings == {"t": pytest.approx(wanted)} and weights == [0.5, 0.5]
    assert resolving.matches() == [
        Matches("parameters.t", "self_attn", 2 * LAYERS),
        Matches("parameters.t", "mlp", 2 * LAYERS),
    ]
    assert resolving.unmatched() == []


def test_ties_with_a_gradient_and_a_rule_for_a_model() -> None:
    resolving = resolver("ties")
    for name, depth in NAMES:
        weights, settings = resolving.at(0, name, depth)
        assert weights == [1.0, 0.5 if "mlp" in name else 0.0]
        assert settings["density"] == pytest.approx([line([1, 0.7, 0.1], depth), 0.33])
        assert (settings["normalize"], settings["lambda_"]) == (True, 1.0)
    assert resolving.matches() == [Matches("weight of org/code", "mlp", 2 * LAYERS)]


def test_dare_names_lambda_as_mergekit_does() -> None:
    weights, settings = resolver("dare-ties").at(0, "embed.weight", 0.0)
    assert weights == [0.4, 0.3, 0.3]
    assert settings == {"density": 0.53, "normalize": True, "lambda_": 1.1}


def test_slices_have_their_own_settings() -> None:
    resolving = resolver("passthrough")
    scales = [
        [resolving.at(number, name, 0.5).settings["scale"] for name, _ in NAMES[1:6]]
        for number in range(3)
    ]
    assert scales == [[1.0] * 5, [1.0, 0.0, 1.0, 0.0, 1.0], [1.0] * 5]
    assert resolving.matches() == [
        Matches("scale of org/other-seventy-b in slices[1]", "o_proj", 1),
        Matches("scale of org/other-seventy-b in slices[1]", "down_proj", 1),
    ]


@pytest.mark.parametrize(
    ("name", "weights", "settings"),
    [
        ("model-stock", [1 / 3, 1 / 3, 1 / 3], {"filter_wise": False}),
        ("task-arithmetic", [0.6, -0.4], {"density": 1.0, "normalize": True, "lambda_": 1.0}),
        ("tokens", [0.5, 0.5], {"normalize": True}),
        ("linear", [1.0, 0.3, 0.5], {"normalize": True}),
        (
            "della",
            [0.5, 0.5],
            {"density": [0.7, 0.4], "epsilon": 0.1, "normalize": False, "lambda_": 1.0},
        ),
    ],
)
def test_settings_of_whole_models(
    name: str, weights: list[float], settings: dict[str, Any]
) -> None:
    found = resolver(name).at(0, "embed.weight", 0.0)
    assert found.weights == pytest.approx(weights) and found.settings == settings
    assert {key: type(value) for key, value in found.settings.items()} == {
        key: type(value) for key, value in settings.items()
    }


def test_globs_and_numbers_written_as_text() -> None:
    resolving = resolver("fisher")
    for name, depth in NAMES:
        settings = resolving.at(0, name, depth).settings
        assert settings["power"] == (0.5 if fnmatchcase(name, "*.mlp.*") else 1.0)
        assert (settings["floor"], settings["rounds"], settings["words"]) == (1e-6, 3, "x")


def test_a_source_wins_over_its_slice_and_the_slice_over_the_recipe() -> None:
    layers = "layer_range: [0, 2]"
    text = f"""
    merge_method: ties
    base_model: base
    slices:
    - sources:
      - {{model: a, {layers}, parameters: {{density: {{filter: mlp, value: 0.1}}}}}}
      - {{model: b, {layers}}}
      parameters: {{density: {{filter: q_proj, value: 0.2}}, weight: 2}}
    - {{sources: [{{model: a, {layers}}}, {{model: b, {layers}, parameters: {{lambda: 9}}}}]}}
    parameters: {{density: 0.3, weight: 1, lambda: 4}}
    """
    resolving = resolver("ties", text)
    found = {
        (number, part): resolving.at(number, f"layers.0.{part}", 0.0)
        for number in (0, 1)
        for part in ("mlp", "q_proj", "norm")
    }
    densities = [one.settings["density"] for one in found.values()]
    assert densities == [[0.1, 0.3], 0.2, 0.3, 0.3, 0.3, 0.3]
    assert [one.weights for one in found.values()] == [[2.0, 2.0]] * 3 + [[1.0, 1.0]] * 3
    assert [one.settings["lambda_"] for one in found.values()] == [4.0] * 3 + [9.0] * 3


def test_the_first_rule_that_matches_decides_and_is_counted_once_a_tensor() -> None:
    rules = "density: [{filter: mlp, value: 0.1}, {glob: '*.mlp.up*', value: 0.2}, {value: 0.3}]"
    text = models("", "", "", more=f"parameters: {{{rules}, lambda: {{filter: mpl, value: 1}}}}")
    resolving = resolver("ties", text)
    for name, depth in NAMES:
        wanted = 0.1 if "mlp" in name else 0.3
        assert resolving.at(0, name, depth).settings["density"] == wanted
    assert resolving.matches() == [
        Matches("parameters.density", "mlp", 2 * LAYERS),
        Matches("parameters.density", "*.mlp.up*", 0),
        Matches("parameters.lambda", "mpl", 0),
    ]
    assert resolving.unmatched() == [
        ("parameters.density", "*.mlp.up*"),
        ("parameters.lambda", "mpl"),
    ]


def test_where_a_model_has_none_the_methods_own_is_taken() -> None:
    resolving = resolver("ties", models("density: 0.2", "", "density: {filter: mlp, value: 0.4}"))
    assert resolving.at(0, "layers.0.mlp", 0).settings["density"] == [0.2, 1.0, 0.4]
    assert resolving.at(0, "layers.0.norm", 0).settings["density"] == [0.2, 1.0, 1.0]


def test_values_for_each_model_on_the_command_line() -> None:
    recipe = from_flags(["a", "b"], "ties", base="c", settings={"density": "0.2,0.4"})
    found = Resolver(recipe, METHODS["ties"]).at(0, "x", 0.0)
    assert (found.weights, found.settings["density"]) == ([0.5, 0.5], [0.2, 0.4])


def test_words_and_whole_numbers_go_by_steps() -> None:
    text = """
    merge_method: fisher
    models: [{model: a}, {model: b}]
    parameters: {words: [first, second], rounds: [{filter: a, value: [1, 5]}, {value: 2}]}
    """
    resolving = resolver("fisher", text)
    found = [resolving.at(0, "a", depth).settings for depth in (0.0, 1.0)]
    assert [one["words"] for one in found] == ["first", "second"]
    assert [one["rounds"] for one in found] == [1, 5]
    assert resolving.at(0, "b", 0.9).settings["words"] == "first"


def test_tensors_of_the_same_settings_share_them() -> None:
    resolving = resolver("slerp")
    first = resolving.at(0, "layers.0.norm", 0.25)
    assert resolving.at(0, "layers.3.norm", 0.75) is first
    assert resolving.at(0, "layers.0.mlp", 0.0) is not first


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ties", models("densty: 1", ""),
         "method ties has no setting 'densty'; did you mean 'density'?"),
        ("ties", models("", "", more="parameters: {lamda: 1}"), "did you mean 'lambda'?"),
        ("ties", models("lambda: 1", "", "lambda: 2"),
         "lambda is one setting for all models in method ties; m0 and m2 give different ones"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_at_once(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolver(name, text)
    said = str(caught.value)
    assert said.startswith("recipe.yml: ") and message in said


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ties", models("weight: 1", ""), "m1 has no weight for embed; other models have one"),
        ("ties", models("weight: 1", "weight: {filter: mlp, value: 1}"), "m1 has no weight for"),
        ("ties", models("weight: heavy", ""), "weight of m0: 'heavy' is not a number"),
        ("ties", models("weight: [true, false]", ""), "weight of m0: True is not a number"),
        ("ties", models("density: much", ""), "density of m0: 'much' is not a number"),
        ("ties", models("", "", more="parameters: {lambda: true}"), "ties lambda: True is not a"),
        ("ties", models("", "", more="parameters: {normalize: 0.5}"), "ties normalize: 0.5 is not"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_the_tensor(name: str, text: str, message: str) -> None:
    resolving = resolver(name, text)
    with pytest.raises(UsageError) as caught:
        resolving.at(0, "embed", 0.0)
    said = str(caught.value)
    assert said.startswith("recipe.yml: ") and message in said and "\n" not in said


def test_a_method_without_weights_or_a_default_says_so() -> None:
    def mix(models: Any, *, share: PerModel | None = None) -> None: ...

    method = method_of("mix", mix)
    with pytest.raises(UsageError, match="method mix has no setting 'weight'"):
        Resolver(recipe_of(models("weight: 1", "", method="mix")), method)
    half = Resolver(recipe_of(models("share: 1", "", method="mix")), method)
    with pytest.raises(UsageError, match="m1 has no share for x; other models have one"):
        half.at(0, "x", 0.0)
    none = Resolver(recipe_of(models("", "", method="mix")), method)
    assert none.at(0, "x", 0.0).settings == {"share": None}
