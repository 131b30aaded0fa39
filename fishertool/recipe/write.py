"""A recipe as YAML."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import yaml

from fishertool.recipe.schema import Recipe, Slice, Source
from fishertool.recipe.settings import Rule, Setting, Settings
from fishertool.recipe.tokens import OF_THE_MODELS, Token, TokenizerChoice


def to_yaml(recipe: Recipe) -> str:
    """Text that reads back as an equal recipe."""
    # Single values stay on one line: {model: a, parameters: {weight: 0.5}}.
    return yaml.safe_dump(
        plain(recipe), sort_keys=False, default_flow_style=None, allow_unicode=True, width=100
    )


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data, keys without a value left out."""
    first = recipe.slices[0]
    content: dict[str, Any] = {"merge_method": recipe.method}
    if recipe.whole and len(recipe.slices) == 1 and not (first.base or first.parameters):
        content["models"] = [_source(source) for source in first.sources]
    else:
        content["slices"] = [_slice(piece) for piece in recipe.slices]
    return content | _given(
        base_model=recipe.base,
        parameters=_settings(recipe.parameters),
        dtype=recipe.dtype,
        tokenizer=None if recipe.tokenizer is None else _tokenizer(recipe.tokenizer),
        chat_template=recipe.chat_template,
        head=recipe.head,
        include=list(recipe.include),
        exclude=list(recipe.exclude),
        seed=recipe.seed,
    )


def renamed(recipe: Recipe, name: Callable[[str], str]) -> Recipe:
    """The recipe with other names for its models and files, as for a report."""

    def maybe(place: str | None) -> str | None:
        return None if place is None else name(place)

    slices = [
        replace(
            piece,
            base=maybe(piece.base),
            sources=tuple(
                replace(source, model=name(source.model), fisher=maybe(source.fisher))
                for source in piece.sources
            ),
        )
        for piece in recipe.slices
    ]
    tokenizer = recipe.tokenizer
    if tokenizer is not None:
        tokens = tuple(
            (text, replace(token, row=replace(token.row, model=maybe(token.row.model))))
            if token.row is not None
            else (text, token)
            for text, token in tokenizer.tokens
        )
        chosen = tokenizer.source
        source = chosen if chosen in OF_THE_MODELS else name(chosen)
        tokenizer = replace(tokenizer, source=source, tokens=tokens)
    template = recipe.chat_template
    if template is not None and "{" not in template:  # a file, not the text of a template
        template = name(template)
    return replace(
        recipe,
        slices=tuple(slices),
        base=maybe(recipe.base),
        tokenizer=tokenizer,
        chat_template=template,
    )


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, [], {}, False, 0)}


def _slice(piece: Slice) -> dict[str, Any]:
    return {"sources": [_source(source) for source in piece.sources]} | _given(
        base_model=piece.base, parameters=_settings(piece.parameters)
    )


def _source(source: Source) -> dict[str, Any]:
    return {"model": source.model} | _given(
        layer_range=None if source.layers is None else list(source.layers),
        parameters=_settings(source.parameters),
        fisher=source.fisher,
    )


def _settings(settings: Settings) -> dict[str, Any]:
    return {name: _setting(setting) for name, setting in settings.items()}


def _setting(setting: Setting) -> Any:
    if not isinstance(setting, tuple):
        return setting
    return [_rule(item) if isinstance(item, Rule) else item for item in setting]


def _rule(rule: Rule) -> dict[str, Any]:
    value = list(rule.value) if isinstance(rule.value, tuple) else rule.value
    return _given(filter=rule.filter, glob=rule.glob) | {"value": value}


def _tokenizer(choice: TokenizerChoice) -> dict[str, Any]:
    tokens = {name: _token(token) for name, token in choice.tokens}
    return {"source": choice.source} | _given(
        tokens=tokens, pad_to_multiple_of=choice.pad_to_multiple_of
    )


def _token(token: Token) -> dict[str, Any]:
    source: Any = None
    if token.row is not None:
        source = token.row.model
        if source is None:
            source = {"kind": "zero"}
        elif token.row.token is not None:
            key = "token" if isinstance(token.row.token, str) else "token_id"
            source = {"kind": "model_token", "model": source, key: token.row.token}
    return _given(source=source, force=token.force)
