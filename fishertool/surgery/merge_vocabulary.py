"""The tokens of a merge, as its recipe chooses them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from fishertool.checkpoint.companions import write_json
from fishertool.checkpoint.json_files import load_json
from fishertool.models.token_donors import Donor
from fishertool.models.token_rows import TokenAligned
from fishertool.models.vocabulary import Vocabulary, match_vocabularies
from fishertool.recipe.schema import Recipe
from fishertool.surgery.merge_inputs import Inputs
from fishertool.surgery.merge_statistics import Sidecar


def choose_vocabulary(recipe: Recipe, inputs: Inputs, trust_remote_code: bool) -> Vocabulary:
    """Match the tokenizers of all models and bases. Raises as `match_vocabularies` does."""
    sources = dict(zip(inputs.references, inputs.sources, strict=True))
    chosen = recipe.tokenizer
    if chosen is None:
        return match_vocabularies(sources, trust_remote_code=trust_remote_code)
    donors = {
        text: Donor(token.row.model, token.row.token, token.force)
        for text, token in chosen.tokens
        if token.row is not None
    }
    return match_vocabularies(
        sources, recipe.base, chosen.source, donors, chosen.pad_to_multiple_of, trust_remote_code
    )


def align(
    inputs: Inputs, vocabulary: Vocabulary, sidecars: Iterable[Mapping[int, Sidecar]]
) -> None:
    """Let everything be read by the output's tokens."""
    for number, reference in enumerate(inputs.references):
        if reference not in vocabulary.rows:
            continue
        view = TokenAligned(inputs.sources[number], vocabulary.rows[reference])
        inputs.sources[number] = view
        for kind in sidecars:
            if number in kind:
                kind[number].rows = vocabulary.rows[reference].own
                kind[number].by_token = view.by_token


def write_vocabulary(vocabulary: Vocabulary, reference: str, folder: Path) -> None:
    """Put the tokenizer's files into the output, and its ids into generation_config.json."""
    vocabulary.write_tokenizer(folder)
    generation = folder / "generation_config.json"
    if generation.exists():
        before = load_json(generation)
        after = vocabulary.renumbered(before, reference)
        if after != before:
            write_json(generation, after)
