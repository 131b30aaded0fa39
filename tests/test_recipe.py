"""Recipes read and written, and what of a recipe is merged."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import METHODS, TEXTS, recipe_of

from fishertool.errors import UsageError
from fishertool.recipe.document import DEEPEST, MOST_BYTES, MOST_VALUES, read_document
from fishertool.recipe.flags import from_flags
from fishertool.recipe.inputs import normalised, weighted
from fishertool.recipe.schema import Recipe, Slice, Source, is_recipe, parse_recipe
from fishertool.recipe.settings import Rule, Scalar, interpolate
from fishertool.recipe.tokens import Token, TokenizerChoice, TokenRow
from fishertool.recipe.write import to_yaml
from fishertool.registry import find_method

TWO = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return path


def parsed(more: str = "", text: str = TWO) -> Recipe:
    return recipe_of(text + more)


def test_slerp_as_model_cards_have_it() -> None:
    found = recipe_of(TEXTS["slerp"])
    assert found == Recipe(
        method="slerp",
        slices=(Slice((Source("org/seven-b", (0, 32)), Source("other/seven-b-chat", (0, 32)))),),
        base="other/seven-b-chat",
        parameters={
            "t": (
                Rule((0, 0.5, 0.3, 0.7, 1), filter="self_attn"),
                Rule((1, 0.5, 0.7, 0.3, 0), filter="mlp"),
                Rule(0.5),
            )
        },
        dtype="bfloat16",
    )
    assert not found.whole


def test_ties_and_dare_as_model_cards_have_them() -> None:
    ties, dare = recipe_of(TEXTS["ties"]), recipe_of(TEXTS["dare-ties"])
    assert ties.slices[0].sources == (
        Source("org/base"),
        Source("org/math", None, {"density": (1, 0.7, 0.1), "weight": 1.0}),
        Source(
            "org/code", None, {"density": 0.33, "weight": (Rule(0.5, filter="mlp"), Rule(0))}
        ),
    )  # fmt: skip
    assert ties.parameters == {"normalize": True} and ties.whole
    assert ties.notes == ("parameters.int8_mask has no effect here",)
    assert (dare.method, dare.dtype) == ("dare-ties", "bfloat16")
    assert dare.tokenizer == TokenizerChoice("base")
    assert [source.model for source in dare.slices[0].sources] == [
        "org/base", "org/a", "org/b@v1.2", "org/c+org/c-lora",
    ]  # fmt: skip
    assert dare.notes == ("parameters.int8_mask has no effect here",)
    [note] = parsed("dtype: float16\nout_dtype: bfloat16\n").notes
    assert "dtype float16 has no effect here: merges are computed in float32" in note


def test_one_module_as_mergekit_writes_it() -> None:
    found = recipe_of(TEXTS["della-linear"])
    [piece] = found.slices
    assert piece.sources[0] == Source(
        "./intermediates/First",
        (0, 40),
        {"density": 0.5, "epsilon": 0.4, "weight": (0.9, 0.2, 0.95)},
    )
    rules = (Rule(0.5, filter="mlp"), Rule(1.0))
    assert found.parameters == {"lambda": rules, "normalize": 1.0}
    assert (found.base, found.tokenizer) == ("org/base", TokenizerChoice("union"))
    assert is_recipe(yaml.safe_load(TEXTS["della-linear"]))
    assert is_recipe({"modules": {}})


def test_what_mergekit_passes_over_at_the_top_is_noted() -> None:
    found = parsed("name: first\nrandom_seed: 0\nint8_mask: true\nlow_cpu_memory: true\n")
    assert found == parsed()
    assert found.notes == tuple(
        f"{key} has no effect here"
        for key in ("int8_mask", "name", "random_seed", "low_cpu_memory")
    )


def test_parameters_that_mergekit_passes_over_are_noted() -> None:
    text = (
        "merge_method: sce\nbase_model: c\nmodels: [{model: a, parameters: {density: 0.5}}, "
        "{model: b}]\nparameters: {normalize: true, weight: 1, select_topk: 0.5}\n"
    )
    sce = find_method("fishertool.merging", "sce")
    found = normalised(recipe_of(text), sce)
    assert found == normalised(
        recipe_of(text.replace("density: 0.5", "").replace("normalize: true, weight: 1,", "")), sce
    )
    assert found.notes == ("density, normalize, weight has no effect in method sce",)
    slices = "slices: [{parameters: {gamma: 1}, sources: [{model: a, layer_range: [0, 2]}]}]"
    found = normalised(recipe_of(f"merge_method: passthrough\n{slices}"), METHODS["passthrough"])
    assert found.slices == (Slice((Source("a", (0, 2)),)),) and len(found.notes) == 1
    for name, more in (("sce", "smooth: 1"), ("fisher", "density: 1"), ("ties", "t: 1")):
        method, kept = find_method("fishertool.merging", name), parsed(f"parameters: {{{more}}}")
        assert normalised(kept, method) == kept  # to be refused by its name


def test_what_mergekit_reads_for_all_models_alone_is_noted_beside_one() -> None:
    given = {"weight": 1, "density": 0.5, "lambda": 0.5}
    content: dict[str, Any] = {"merge_method": "ties", "base_model": "c"}
    beside = content | {"models": [{"model": "a", "parameters": given}, {"model": "b"}]}
    ties = find_method("fishertool.merging", "ties")
    [note] = normalised(parse_recipe(beside, "x"), ties).notes
    assert note.startswith("lambda of one model counts for all; mergekit passes it over there")
    above = content | {"models": [{"model": "a"}, {"model": "b"}], "parameters": given}
    assert normalised(parse_recipe(above, "x"), ties).notes == ()
    flags = from_flags(["a", "b"], "ties", base="c", settings={"lambda": "0.5,0.5"})
    assert normalised(flags, ties).notes == ()


def test_a_model_that_is_listed_twice_counts_twice_and_is_noted() -> None:
    three = "merge_method: linear\nmodels: [{model: a}, {model: b}, {model: a}]\n"
    found = normalised(parsed(text=three), METHODS["linear"])
    assert found == parsed(text=three)
    assert found.notes == (
        "models 1, 3 are the same, and count as 2; in mergekit they count as one",
    )
    assert normalised(from_flags(["a", "a"]), METHODS["linear"]).notes == ()
    one, two = ({"model": "a", "layer_range": [at, at + 2]} for at in (0, 2))
    apart = {"merge_method": "linear", "slices": [{"sources": [one, two]}]}
    assert normalised(parse_recipe(apart, "x"), METHODS["linear"]).notes == ()
    same = {"merge_method": "linear", "slices": [{"sources": [one, two, one]}]}
    [note] = normalised(parse_recipe(same, "x"), METHODS["linear"]).notes
    assert note.startswith("models 1, 3 of slices[0] are the same")


def test_layers_on_top_of_each_other() -> None:
    found = recipe_of(TEXTS["passthrough"])
    [one, two, three] = found.slices
    assert one == Slice((Source("org/seventy-b", (0, 16)),))
    assert two.sources[0].layers == (8, 24) and three.sources[0].layers == (17, 32)
    assert two.sources[0].parameters["scale"] == (
        Rule(0.0, filter="o_proj"), Rule(0.0, filter="down_proj"), Rule(1.0),
    )  # fmt: skip


def test_numbers_that_yaml_takes_for_text_and_models_in_long_form() -> None:
    sources = recipe_of(TEXTS["linear"]).slices[0].sources
    assert [source.parameters["weight"] for source in sources] == [1.0, 0.3, 0.5]
    assert sources[2].model == "org/c@abc+org/c-lora"
    assert recipe_of(TEXTS["linear"]).dtype == "float16"
    assert recipe_of(TEXTS["della"]).base == "org/base@main"
    floor = recipe_of(TEXTS["fisher"]).parameters["floor"]
    assert (floor, type(floor)) == (1e-6, float)


def test_tokens() -> None:
    assert recipe_of(TEXTS["tokens"]).tokenizer == TokenizerChoice(
        "union",
        (
            ("<|im_start|>", Token(TokenRow("org/b"))),
            ("<|im_end|>", Token(TokenRow("org/a", "</s>"), force=True)),
            ("<|pad|>", Token(TokenRow())),
            ("<|odd|>", Token(TokenRow("org/a", 7))),
            ("<|plain|>", Token()),
        ),
        64,
    )
    assert parsed("tokenizer_source: 'model:org/x'").tokenizer == TokenizerChoice("org/x")
    assert parsed("tokenizer: {tokens: {x: {source: a}}}").tokenizer == TokenizerChoice(
        "union", (("x", Token(TokenRow("a"))),)
    )


def test_what_is_ours() -> None:
    found = recipe_of(TEXTS["fisher"])
    assert [source.fisher for source in found.slices[0].sources] == ["fisher-a", "fisher-b"]
    assert found.parameters["power"] == (Rule(0.5, glob="*.mlp.*"), Rule(1))
    assert (found.head, found.seed) == ("keep-first", 3)
    assert (found.include, found.exclude) == (("model.*",), ("*.bias", "*norm*"))
    assert found.reads == ["base", "a", "b", "fisher-a", "fisher-b"]


def test_a_rule_alone_and_one_for_all_tensors() -> None:
    found = parsed("parameters: {x: {filter: mlp, value: 1}, y: [{filter: '*', value: [1, 2]}]}")
    assert found.parameters == {"x": (Rule(1, filter="mlp"),), "y": (Rule((1, 2)),)}


def test_what_is_null_is_not_given() -> None:
    found = parsed("base_model:\nparameters: {density: null, gamma: 1}\ndtype: ~\nseed:\n")
    assert found == parsed("parameters: {gamma: 1}")


def read_recipe(path: Path) -> Recipe:
    return parse_recipe(read_document(path), str(path))


@pytest.mark.parametrize("name", TEXTS)
def test_a_recipe_written_reads_back_as_itself(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(TEXTS[name])
    for one in (recipe, normalised(recipe, METHODS[name])):
        assert read_recipe(written(tmp_path, to_yaml(one))) == one


def test_awkward_words_are_written_so_that_they_read_back(tmp_path: Path) -> None:
    given: dict[str, Scalar] = {
        "weight": 1e-30,
        "word": "none",
        "flag": False,
        "zero": 0,
        "large": 10**30,
    }
    one = Slice((Source("a: b", (0, 2), given),), "null", {"t": (True, False), "u": (0, 1e20)})
    recipe = Recipe(
        "x", (one, one), "- c", {"w": ("yes", "*", "\u00e9 #")}, chat_template="{%\n%}\n"
    )
    again = read_recipe(written(tmp_path, to_yaml(recipe)))
    assert again == recipe
    assert repr(again.slices) == repr(recipe.slices)  # True is not 1 here


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "['a'] is not a mapping of keys to values"),
        ("models: [{model: a}]", "needs a merge_method"),
        ("merge_method: linear", "needs models or slices"),
        (TWO + "slices: []", "models and slices exclude each other"),
        (TWO + "modules: {}", "models and modules exclude each other"),
        ("merge_method: linear\nmodules: {}", "modules: 0 modules (); one is supported"),
        ("merge_method: linear\nmodules: {a: {models: []}, b: {models: []}}",
         "modules: 2 modules (a, b); one is supported"),
        ("merge_method: linear\nmodules: {a: {models: [], slices: []}}",
         "modules.a: models and slices exclude each other"),
        ("merge_method: linear\nmodules: {a: {model: []}}",
         "modules.a: no key 'model'; did you mean 'models'?"),
        ("merge_method: linear\nmodules: {a: {models: [{modl: b}]}}",
         "modules.a.models[0]: no key 'modl'; did you mean 'model'?"),
        (TWO + "t: 0.5", "t belongs under parameters"),
        (TWO + "name: x\nsoure: 1", "no key 'soure'; known: merge_method, models, slices, base_model,"),
        ("base_model: a\ngate_mode: hidden", "experts are for mergekit-moe"),
        ("merge_method: moe\nbase_model: a\nexperts: [{source_model: b}]", "mergekit-moe"),
        ("merge_method: linear\nmodels: [{model: org/a, revision: b}]",
         "models[0]: a revision is written as part of the model, as org/name@revision"),
        (TWO + "base-model: a", "no key 'base-model'; did you mean 'base_model'?"),
        (TWO + "3: a", "the key 3 is not a text"),
        (TWO + "base_model: 3", "base_model: 3 is not a text"),
        (TWO + "base_model: {revision: a}", "base_model: no key 'revision'; known: model, lora"),
        (TWO + "base_model: {path: a, revison: a}",
         "base_model: no key 'revison'; did you mean 'revision'?"),
        (TWO + "base_model: {path: a, revision: 12}", "base_model.revision: 12 is not a text"),
        (TWO + "dtype: bf16", "dtype: 'bf16'; did you mean 'bfloat16'?"),
        (TWO + "dtype: int8", "dtype: 'int8'; known: float16, bfloat16, float32, float64"),
        (TWO + "head: keep-frist", "head: 'keep-frist'; did you mean 'keep-first'?"),
        (TWO + "seed: -1", "seed: -1 is not a whole number of at least 0"),
        (TWO + "seed: true", "seed: True is not a whole number of at least 0"),
        (TWO + "include: []", "include: [] is not a list with something in it"),
        (TWO + "exclude: [1]", "exclude[0]: 1 is not a text"),
        (TWO + "parameters: [t]", "parameters: ['t'] is not a mapping of keys to values"),
        (TWO + "parameters: {t: .nan}",
         "parameters.t: nan is not a finite number, a word, true or false"),
        (TWO + "parameters: {t: 1e999}", "parameters.t: '1e999' is not a finite number,"),
        (TWO + f"parameters: {{t: 1{'0' * 400}}}", "is not a finite number,"),
        (TWO + f"parameters: {{t: [0, -1{'0' * 400}]}}", "parameters.t[1]: -1"),
        (TWO + "parameters: {t: []}", "parameters.t: [] is not a list with something in it"),
        (TWO + "parameters: {t: [1, [2]]}", "parameters.t[1]: [2] is not a finite number,"),
        (TWO + "parameters: {t: 2024-01-01}", "is not a finite number,"),
        (TWO + "parameters: {t: [1, {value: 2}]}", "parameters.t[0]: 1 is not a mapping"),
        (TWO + "parameters: {t: [{filter: a}]}", "parameters.t[0]: a rule needs a value"),
        (TWO + "parameters: {t: {filtr: a, value: 1}}",
         "parameters.t: no key 'filtr'; did you mean 'filter'?"),
        (TWO + "parameters: {t: {filter: [a], value: 1}}", "parameters.t.filter: ['a'] is not a"),
        (TWO + "parameters: {t: {filter: a, glob: b, value: 1}}", "exclude each other"),
        (TWO + "tokenizer: union", "tokenizer: 'union' is not a mapping"),
        (TWO + "tokenizer: {}\ntokenizer_source: base",
         "tokenizer and tokenizer_source exclude each other"),
        (TWO + "tokenizer: {pad_to_multiple_of: 0}",
         "tokenizer.pad_to_multiple_of: 0 is not a whole number of at least 1"),
        (TWO + f"tokenizer: {{pad_to_multiple_of: {10**15}}}",
         f"pad_to_multiple_of: {10**15} is not a whole number of at least 1 and at most 1048576"),
        (TWO + "tokenizer: {tokens: {x: {force: 1}}}",
         "tokenizer.tokens.x.force: 1 is not true or false"),
        (TWO + "tokenizer: {tokens: {x: {force: true}}}",
         "tokenizer.tokens.x: force needs a source, whose row all models have then"),
        (TWO + "tokenizer: {tokens: {x: {source: {kind: none}}}}",
         "tokenizer.tokens.x.source.kind: 'none'; known: zero, model_token"),
        (TWO + "tokenizer: {tokens: {x: {source: {kind: zero, model: a}}}}",
         "tokenizer.tokens.x.source: a row of kind zero has no other keys"),
        (TWO + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
         "tokenizer.tokens.x.source: a row of kind model_token needs a model, and a token or"),
        ("merge_method: linear\nmodels: []", "models: [] is not a list with something in it"),
        ("merge_method: linear\nmodels: [a]", "models[0]: 'a' is not a mapping"),
        ("merge_method: linear\nmodels: [{parameters: {}}]", "models[0]: needs a model"),
        ("merge_method: linear\nmodels: [{model: a}, {model: b, layer_range: [0, 1]}]",
         "models[1]: no key 'layer_range'; known: model, parameters, fisher"),
        ("merge_method: linear\nslices: [{source: []}]",
         "slices[0]: no key 'source'; did you mean 'sources'?"),
        ("merge_method: linear\nslices: [{sources: [{model: a}]}]",
         "slices[0].sources[0]: needs a layer_range"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]},"
         " {model: b, layer_rang: [0, 1]}]}]",
         "slices[0].sources[1]: no key 'layer_rang'; did you mean 'layer_range'?"),
        *[(f"merge_method: linear\nslices: [{{sources: [{{model: a, layer_range: {layers}}}]}}]",
           "slices[0].sources[0].layer_range")
          for layers in ("3", "[1]", "[3, 3]", "[0, 1, 2]", "[0.0, 1.0]", "[-1, 2]", "'0-4'")],
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_of(text)
    said = str(caught.value)
    assert said.startswith("recipe.yml: ") and message in said and "\n" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO + "seed: 1\nseed: 2", "line 4, column 1: the key 'seed' is there twice"),
        ("a: {b: 1, b: 2}", "line 1, column 11: the key 'b' is there twice"),
        ("a: [", "line 1, column 5: "),
        ("a: *b", "undefined alias"),
        ("--- a\n--- b", "line 2, column 1: a second document begins; give each a file of its own"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: \x07", "not YAML: "),
        ("a: " + "9" * 5000, "not YAML: "),
        ("a: 2024-99-99", "not YAML: "),
        ("{[a]: b}", "unhashable key"),
        ('a: !!int ""', "line 1, column 4: '' is not of the type int"),
        ('a: [!!float ""]', "line 1, column 5: '' is not of the type float"),
        ('a: !!bool "maybe"', "line 1, column 4: 'maybe' is not of the type bool"),
        ('!!timestamp "abc": a', "line 1, column 1: 'abc' is not of the type timestamp"),
        ('a: "\\ud800"', "line 1, column 4: a text has half a character"),
        ("a: &x [*x]", f"nested more than {DEEPEST} deep"),
        ("[" * 200 + "]" * 200, f"nested more than {DEEPEST} deep"),
        ("- " * 90_000, f"nested more than {DEEPEST} deep"),
        ("[" * 40 + "]" * 40, f"nested more than {DEEPEST} deep"),
        ("a: " + "x" * MOST_BYTES, f"more than {MOST_BYTES:,} bytes"),
        ("".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9)),
         f"more than {MOST_VALUES:,} values"),
    ],
    ids=range(21),
)  # fmt: skip
def test_hostile_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_document(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and message in said and "\n" not in said


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_recipe(tmp_path / "absent.yml")
    (tmp_path / "latin.yml").write_bytes(b"a: \xff")
    with pytest.raises(UsageError, match=r"latin.yml: not YAML: 'utf-8'"):
        read_recipe(tmp_path / "latin.yml")
    with pytest.raises(UsageError, match="None is not a mapping"):
        read_recipe(written(tmp_path, ""))


def test_anchors_are_what_they_stand_for(tmp_path: Path) -> None:
    found = read_recipe(written(tmp_path, TEXTS["della"]))
    first, second = found.slices[0].sources
    assert first.parameters == {"density": 0.7, "epsilon": 0.1, "weight": 0.5}
    assert second.parameters == {"density": 0.4, "epsilon": 0.1, "weight": 0.5}


def test_what_is_a_recipe() -> None:
    assert is_recipe(yaml.safe_load(TWO))
    assert not is_recipe({"models": ["a", "b"], "method": "linear"})
    assert not any(map(is_recipe, (None, [], "merge_method")))


def test_a_seed_that_decides_nothing_is_left_out() -> None:
    recipe = recipe_of(TEXTS["ties"] + "seed: 3\n")
    assert normalised(recipe, METHODS["ties"]).seed == 0
    assert normalised(recipe, find_method("fishertool.merging", "dare-ties")).seed == 3


def test_the_base_is_not_merged_where_the_method_has_one() -> None:
    found = normalised(recipe_of(TEXTS["task-arithmetic"]), METHODS["task-arithmetic"])
    assert found.base == "org/base"
    assert [source.model for source in found.slices[0].sources] == ["org/a", "org/b"]
    assert found.notes == ("weight of the base has no effect: it is not merged",)
    quiet = normalised(recipe_of(TEXTS["ties"]), METHODS["ties"])
    assert [source.model for source in quiet.slices[0].sources] == ["org/math", "org/code"]
    assert not any("org/base" in note for note in quiet.notes)
    absent = recipe_of(TEXTS["della"])
    assert normalised(absent, METHODS["della"]) == absent


def test_the_base_is_the_first_where_the_method_goes_from_it() -> None:
    found = normalised(recipe_of(TEXTS["slerp"]), METHODS["slerp"])
    assert found.base is None
    assert [source.model for source in found.slices[0].sources] == [
        "other/seven-b-chat", "org/seven-b",
    ]  # fmt: skip
    missing = parsed("base_model: b\n", "merge_method: slerp\nmodels: [{model: a}]\n")
    assert normalised(missing, METHODS["slerp"]).slices == (Slice((Source("b"), Source("a"))),)
    slices = "slices: [{base_model: b, sources: [{model: a, layer_range: [2, 4]}]}]"
    [one] = normalised(recipe_of(f"merge_method: slerp\n{slices}"), METHODS["slerp"]).slices
    assert one == Slice((Source("b", (2, 4)), Source("a", (2, 4))))
    third = parsed("base_model: c\n", TWO.replace("linear", "slerp"))
    with pytest.raises(UsageError, match="slerp goes from the base c to one other model; 2 are"):
        normalised(third, METHODS["slerp"])
    same = "slices: [{sources: [{model: a, layer_range: [2, 4]}, {model: a, layer_range: [3, 5]}]}]"
    [one] = normalised(
        recipe_of(f"merge_method: slerp\nbase_model: a\n{same}"), METHODS["slerp"]
    ).slices
    assert [source.layers for source in one.sources] == [(2, 4), (3, 5)]


def test_the_base_is_one_of_the_models_where_the_method_has_none() -> None:
    found = normalised(parsed("base_model: b\ntokenizer_source: base\n"), METHODS["linear"])
    assert found.base is None and found.slices == parsed().slices
    assert found.tokenizer == TokenizerChoice("b")
    with pytest.raises(UsageError, match="linear takes no base_model; to merge c, list it"):
        normalised(parsed("base_model: c\n"), METHODS["linear"])
    with pytest.raises(UsageError, match=r"^method linear takes no --base"):
        normalised(from_flags(["a", "b"], base="c"), METHODS["linear"])


def test_a_base_of_single_slices() -> None:
    layers = "layer_range: [0, 2]"
    text = (
        "merge_method: ties\nbase_model: x\nslices:\n"
        f"- {{base_model: y, sources: [{{model: y, {layers}}}, {{model: a, {layers}}}]}}\n"
        f"- {{sources: [{{model: x, {layers}}}, {{model: y, {layers}}}]}}\n"
    )
    found = normalised(recipe_of(text), METHODS["ties"])
    assert [(piece.base, piece.sources) for piece in found.slices] == [
        ("y", (Source("a", (0, 2)),)), (None, (Source("y", (0, 2)),)),
    ]  # fmt: skip
    assert found.base == "x"
    other = text.replace(f"model: a, {layers}", "model: a, layer_range: [1, 3]")
    with pytest.raises(
        UsageError, match=r"slices\[0\]: the base y has layers \(0, 2\), a \(1, 3\)"
    ):
        normalised(recipe_of(other), METHODS["ties"])


def test_a_base_that_slices_of_layers_do_not_need_is_noted() -> None:
    recipe = recipe_of(TEXTS["passthrough"] + "base_model: org/x\ntokenizer_source: base\n")
    found = normalised(recipe, METHODS["passthrough"])
    assert (found.base, found.tokenizer) == (None, TokenizerChoice("org/x"))
    assert (
        len(found.notes) == 1 and "base_model has no effect in method passthrough" in found.notes[0]
    )


def test_flags_make_the_recipe_that_a_file_would() -> None:
    found = from_flags(
        ["a", "b"],
        "fisher",
        fisher=["fa", "fb"],
        base="c",
        head="merge",
        settings={"power": "5e-1", "floor": None, "density": "0.5, 0.7", "words": "w", "n": 2},
        tokenizer="union",
        include=["*.q"],
        exclude=["*.k"],
        seed=4,
    )
    text = """
    merge_method: fisher
    models:
    - {model: a, fisher: fa, parameters: {weight: 0.6, density: 0.5}}
    - {model: b, fisher: fb, parameters: {weight: 0.4, density: 0.7}}
    base_model: c
    parameters: {power: 0.5, floor: none, words: w, n: 2}
    head: merge
    tokenizer: {source: union}
    include: ["*.q"]
    exclude: ["*.k"]
    seed: 4
    """
    found = weighted(found, METHODS["fisher"], [0.6, 0.4])
    assert found == recipe_of(text)
    assert from_flags(["a", "b"]) == parsed()


def test_a_preset_is_under_what_is_given() -> None:
    found = from_flags(["a", "b"], "fisher", preset="matena", settings={"floor": "0"})
    assert found.parameters == {
        "normalization": "l2", "floor": 0, "floor_scale": "absolute", "floor_models": "first",
        "power": 1.0,
    }  # fmt: skip
    assert found.head == "keep-first"
    assert from_flags(["a"], "fisher", preset="matena", head="merge").head == "merge"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fisher": ["f"]}, "--fisher: 1 sidecars for 2 models; give one --fisher for each"),
        ({"head": "kep-first"}, "--head 'kep-first'; did you mean 'keep-first'?"),
        ({"settings": {"density": "1,2,3"}}, "--set density has 3 values for 2 models"),
        ({"settings": {"power": ""}}, "--set power: '' is not a finite number"),
        ({"settings": {"power": float("nan")}}, "--set power: nan is not a finite number"),
        ({"preset": "matina", "method": "fisher"}, "--preset 'matina'; did you mean 'matena'?"),
        ({"preset": "matena"}, "--preset matena is for --method fisher, not linear"),
    ],
)
def test_wrong_flags(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_flags(["a", "b"], **given)
    assert message in str(caught.value)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.99, 1.0])
def test_gradients_are_straight_lines_between_their_values(depth: float) -> None:
    numbers = (0.0, 2.0, 1.0, -4.0)
    place = depth * 3
    wanted = sum(max(0.0, 1 - abs(place - at)) * number for at, number in enumerate(numbers))
    assert interpolate(numbers, depth) == pytest.approx(wanted, abs=1e-12)
    assert interpolate((7,), depth) == interpolate(7, depth) == 7
    assert interpolate(("a", "b", "c", "d"), depth) == "abcd"[int(place)]
    assert interpolate((True, False), depth) is (depth < 1)


def test_plain_data_is_not_changed() -> None:
    content = yaml.safe_load(TEXTS["ties"])
    parse_recipe(content, "x")
    assert content == yaml.safe_load(TEXTS["ties"])


@pytest.mark.parametrize("layers", [47, 48, 56, 78, 95, 124])
def test_words_of_one_a_layer_are_each_layers_own(layers: int) -> None:
    """A depth is a ratio, and its product may be just below a whole number."""
    words = tuple(f"w{layer}" for layer in range(layers))
    found = [interpolate(words, layer / (layers - 1)) for layer in range(layers)]
    assert found == list(words)
