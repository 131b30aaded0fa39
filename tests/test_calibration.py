"""Rows of a file -> examples of each form."""

from pathlib import Path
from typing import Any

import pytest
from conftest import VOCABULARY, make_text, make_tokenizer, write_rows

from fishertool.calibration import UNSCORED, CalibrationData, DataOptions, Example, load
from fishertool.calibration.data import probes
from fishertool.errors import InputError, UsageError
from fishertool.models.tasks import TASKS

LABELS = {"none": 0, "thing": 1}
MASK = 1


def read(tmp_path: Path, task: str, rows: list[Any], **options: Any) -> CalibrationData:
    write_rows(tmp_path / "d.jsonl", rows)
    given = DataOptions(str(tmp_path / "d.jsonl"), **options)
    form = TASKS[task].form
    given = form.resolve(given, task)
    labels = LABELS if TASKS[task].has_labels else None
    return load(given, make_tokenizer(template=True), 32, labels, form)


def test_which_tokens_are_masked(tmp_path: Path) -> None:
    """By seed and row alone; never a special token, at least one, and nothing else changes."""
    rows = [{"text": make_text(n, 1 + 3 * n)} for n in range(6)]
    data = read(tmp_path, "masked-lm", rows)
    plain = read(tmp_path, "causal-lm", rows)
    for example, whole in zip(data.examples, plain.examples, strict=True):
        assert example.targets is not None
        ids, original = example.inputs["input_ids"], whole.inputs["input_ids"]
        places = [n for n, target in enumerate(example.targets) if target != UNSCORED]
        assert len(places) == max(1, round(0.15 * (len(ids) - 2)))
        assert 0 not in places and len(ids) - 1 not in places
        for n, target in enumerate(example.targets):
            assert (ids[n], target) == (
                (MASK, original[n]) if n in places else (original[n], UNSCORED)
            )
    again = read(tmp_path, "masked-lm", rows, num_examples=3)
    assert again.examples == data.examples[:3]
    other = read(tmp_path, "masked-lm", rows, seed=1)
    assert other.examples != data.examples and other.fingerprint() != data.fingerprint()
    assert read(tmp_path, "masked-lm", rows, mask_fraction=1.0).examples[1].targets == [
        UNSCORED, *plain.examples[1].inputs["input_ids"][1:-1], UNSCORED,
    ]  # fmt: skip


def test_words_may_be_a_text_and_labels_may_be_missing(tmp_path: Path) -> None:
    listed = read(tmp_path, "token-classification", [{"text": ["a", "cat-dog"], "label": [0, 1]}])
    spelt = read(
        tmp_path, "token-classification", [{"text": "a  cat-dog", "label": ["none", "thing"]}]
    )
    assert listed.examples == spelt.examples and listed.labelled
    assert listed.examples[0].targets == [UNSCORED, 0, 1, UNSCORED, UNSCORED, UNSCORED]
    bare = read(tmp_path, "token-classification", [{"text": "a cat-dog"}])
    assert bare.examples[0].targets == [UNSCORED, 0, 0, UNSCORED, UNSCORED, UNSCORED]
    assert not bare.labelled


def test_an_empty_completion_is_counted(tmp_path: Path) -> None:
    rows = [
        {"text": "the red cat", "more": " runs fast"},
        {"text": make_text(0, 40), "more": " runs"},
        {"text": "the red cat", "more": ""},
        {"text": "", "more": None},
        {"text": make_text(0, 29), "more": " runs fast and slow"},
    ]
    data = read(tmp_path, "causal-lm", rows, text_pair_column="more", mask_prompt=True)
    assert (data.empty, data.unscored, data.truncated) == (1, 2, 1)
    scored = [[t for t in e.targets or () if t != UNSCORED] for e in data.examples]
    runs, fast, sep = VOCABULARY["runs"], VOCABULARY["fast"], 3
    assert scored == [[runs, fast, sep], [runs, sep]]
    assert "2 rows were left out: they have no completion" in data.warnings()[-1]
    with pytest.raises(
        InputError, match="nothing to score in its 1 rows with text: they have no completion"
    ):
        read(tmp_path, "causal-lm", rows[2:3], text_pair_column="more", mask_prompt=True)


def test_a_probe_keeps_the_end_of_its_text(tmp_path: Path) -> None:
    """By which some classifiers find what they read: an end-of-sequence token."""
    long = list(range(4, 104))
    inputs = {"input_ids": long, "token_type_ids": [0] * 99 + [1]}
    example = Example(inputs, 0, 9, targets=long, candidates=[{"input_ids": [7, 8]}])
    probe, longer = probes([example])
    assert probe.inputs["input_ids"] == [*long[:31], long[-1]] == probe.targets
    assert probe.inputs["token_type_ids"] == [0] * 31 + [1]
    assert probe.candidates == example.candidates and probe.label == 0
    assert longer == example.cut(40)
    assert probes([probe]) == (probe, None)


def test_bytes_are_those_of_both_texts(tmp_path: Path) -> None:
    row = {"text": "the cat", "more": "r\N{LATIN SMALL LETTER U WITH DIAERESIS}n"}
    one = read(tmp_path, "causal-lm", [row]).examples[0]
    two = read(tmp_path, "causal-lm", [row], text_pair_column="more").examples[0]
    assert (one.text_bytes, two.text_bytes) == (7, 7 + 4)


def test_classes_of_words_go_by_their_names(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["THING", "NONE"])
    features = datasets.Features(
        {"text": datasets.List(datasets.Value("string")), "label": datasets.List(names)}
    )
    rows = {"text": [["a", "cat"]], "label": [[1, 0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    form = TASKS["token-classification"].form
    options = form.resolve(DataOptions(str(tmp_path / "d.parquet")), "token-classification")
    data = load(options, make_tokenizer(template=True), 32, LABELS, form)
    assert data.examples[0].targets == [UNSCORED, 0, 1, UNSCORED]


def documents(data: CalibrationData) -> list[list[int]]:
    """The word each document of each query is."""
    return [[text["input_ids"][1] for text in example.candidates] for example in data.examples]


def test_blocks_are_cut_in_the_datas_order(tmp_path: Path) -> None:
    words = list(VOCABULARY)[4:14]
    rows = [{"query": "and", "positive": word} for word in words]
    ids = [VOCABULARY[word] for word in words]
    eight_two = documents(read(tmp_path, "embedding", rows))
    assert [sorted(found) for found in eight_two] == [ids[:8]] * 8 + [ids[8:]] * 2
    assert [found[0] for found in eight_two] == ids
    threes = documents(read(tmp_path, "embedding", rows, in_batch_negatives=3))
    assert [sorted(found) for found in threes] == [ids[:3]] * 3 + [ids[3:6]] * 3 + [ids[6:]] * 4
    nine = documents(read(tmp_path, "embedding", rows[:9]))
    assert [sorted(found) for found in nine] == [ids[:9]] * 9  # the ninth would be alone
    with pytest.raises(InputError, match="no candidate besides the positive"):
        read(tmp_path, "embedding", rows[:1])


def test_negatives_are_a_querys_own_or_its_blocks_too(tmp_path: Path) -> None:
    rows = [
        {"query": "and", "positive": "cat", "negative": ["dog", "cat", "bird"]},
        {"query": "or", "positive": "red", "negative": ["cat"]},
        {"query": "not", "positive": "blue", "negative": []},
        {"query": None, "positive": "blue", "negative": ["red"]},
    ]
    cat, dog, bird, red, blue = (VOCABULARY[w] for w in ("cat", "dog", "bird", "red", "blue"))
    own = read(tmp_path, "embedding", rows)
    assert documents(own) == [[cat, dog, bird], [red, cat]]
    assert (own.empty, own.unscored) == (1, 1)
    shared = read(tmp_path, "embedding", rows, in_batch_negatives=2)
    assert documents(shared) == [
        [cat, dog, bird, red, blue],
        [red, cat, dog, bird, blue],
        [blue, cat, dog, bird, red],
    ]
    single = [{"query": "and", "positive": "cat", "negative": "dog"}]
    assert documents(read(tmp_path, "embedding", single)) == [[cat, dog]]


def test_the_fingerprint_covers_all_that_is_read(tmp_path: Path) -> None:
    def of(task: str, row: dict[str, Any], **options: Any) -> str:
        return read(tmp_path, task, [row], **options).fingerprint()

    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("token-classification", {"text": ["cat"], "label": [0]}, {"label": [1]}),
        ("sequence-classification", {"text": "cat", "label": 0}, {"label": 1}),
        ("sequence-to-sequence", {"text": "cat", "target": "dog"}, {"target": "bird"}),
        ("embedding", {"query": "a", "positive": "cat", "negative": "dog"}, {"negative": "red"}),
        ("embedding", {"query": "a", "positive": "cat", "negative": "dog"}, {"positive": "red"}),
    ]
    for task, row, change in changes:
        assert of(task, row) == of(task, row) != of(task, row | change)
    both = {"text": "the cat", "more": "runs"}
    whole = of("causal-lm", {"text": "the cat runs"})
    assert whole != of("causal-lm", both, text_pair_column="more", mask_prompt=True)


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        ("token-classification", {"text": ["cat"], "label": [2]}, "row 0: word 0: label 2 is none"),
        ("token-classification", {"text": "a cat", "label": [1]}, "2 words, but 1 classes in its label"),
        ("token-classification", {"text": "cat", "label": 1}, "its label is int, not a list"),
        ("token-classification", {"text": [3], "label": [1]}, "word 0 of its text is int"),
        ("masked-lm", {"text": 5}, "row 0: its text is int"),
        ("masked-lm", {"text": "wolf"}, "no token that could be masked"),
        ("sequence-to-sequence", {"text": "cat", "label": "dog"}, "no column 'target'; it has 'text'"),
        ("sequence-to-sequence", {"text": "cat", "target": " "}, "no rows with text"),
        ("embedding", {"query": "cat"}, "no column 'positive'"),
        ("embedding", {"query": "cat", "positive": ["dog"]}, "its positive is list"),
        ("embedding", {"query": "a", "positive": "b", "negative": [1]}, "text 0 of its negative is int"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, task: str, row: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        read(tmp_path, task, [row])


@pytest.mark.parametrize(
    ("task", "options", "told"),
    [
        ("embedding", {"text_column": "body"}, "--text-column is not for embedding, which takes --query"),
        ("embedding", {"label_column": "y"}, "--label-column is not for embedding"),
        ("causal-lm", {"scale": 20.0}, "--scale is not for causal-lm"),
        ("causal-lm", {"mask_fraction": 0.15}, "--mask-fraction is not for causal-lm"),
        ("causal-lm", {"target_column": "target"}, "--target-column is not for causal-lm"),
        ("masked-lm", {"mask_prompt": True}, "--mask-prompt is not for masked-lm"),
        ("token-classification", {"text_pair_column": "b"}, "--text-pair-column is not for"),
        ("sequence-to-sequence", {"chat_column": "b"}, "--chat-column is not for"),
        ("masked-lm", {"query_column": "query"}, "--query-column is not for masked-lm"),
        ("masked-lm", {"in_batch_negatives": 8}, "--in-batch-negatives is not for masked-lm"),
        ("masked-lm", {"mask_fraction": 1.5}, "--mask-fraction 1.5: is above 0"),
        ("embedding", {"scale": float("nan")}, "--scale nan: is a number"),
        ("embedding", {"in_batch_negatives": 1}, "at least 2"),
        ("causal-lm", {"mask_prompt": True}, "--mask-prompt: give --chat-column"),
        ("causal-lm", {"mask_prompt": True, "chat_column": "a", "text_pair_column": "b"}, "give --chat"),
    ],
)  # fmt: skip
def test_flags_that_do_not_apply(task: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        TASKS[task].form.resolve(DataOptions("d", **options), task)


@pytest.mark.parametrize(
    ("text", "wanted"), [("\u65e5\u672c", 5), ("\u00e9", 1), ("the", 2), ("\U0001f642", 3)]
)
def test_bytes_of_a_first_token_within_a_character(tmp_path: Path, text: str, wanted: int) -> None:
    """All but what the first token spells: a byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: number for number, letter in enumerate(letters)}, [])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    write_rows(tmp_path / "d.jsonl", [{"text": text}])
    form = TASKS["causal-lm"].form
    options = form.resolve(DataOptions(str(tmp_path / "d.jsonl")), "causal-lm")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    [example] = load(options, tokenizer, 32, None, form).examples
    assert example.text_bytes == wanted
