"""Which tokenizer a merge has, and where the embedding rows of single tokens come from."""

from dataclasses import dataclass
from typing import Literal

from fishertool.recipe.document import Value
from fishertool.recipe.references import parse_reference

TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
TOKEN_KEYS = ("source", "force")
LARGEST_MULTIPLE = 1 << 20
ROW_KEYS = ("kind", "model", "token", "token_id")
OF_THE_MODELS = ("union", "base")
"""Sources that are no model's name."""


@dataclass(frozen=True)
class TokenRow:
    """The embedding row of one token: a model's row of a token, or zeros where `model` is None."""

    model: str | None = None
    token: str | int | None = None
    """A token or its number in that model; None for the same token."""


@dataclass(frozen=True)
class Token:
    """How one token's row is made."""

    row: TokenRow | None = None
    """None: as all others, averaged over the models that know the token."""
    force: bool = False
    """Give every model this row, even those that know the token themselves."""


@dataclass(frozen=True)
class TokenizerChoice:
    source: str
    """`union`, `base` or a model."""
    tokens: tuple[tuple[str, Token], ...] = ()
    pad_to_multiple_of: int | None = None


def parse_source(value: Value) -> str:
    """`union`, `base` or a model; `model:NAME` is how mergekit once wrote the last."""
    return parse_reference(value).removeprefix("model:")


def parse_tokenizer(value: Value) -> TokenizerChoice:
    keys = value.keys(TOKENIZER_KEYS)
    tokens = keys["tokens"].keys() if "tokens" in keys else {}
    return TokenizerChoice(
        parse_source(keys["source"]) if "source" in keys else "union",
        tuple((name, _parse_token(token)) for name, token in tokens.items()),
        keys["pad_to_multiple_of"].whole(1, LARGEST_MULTIPLE)
        if "pad_to_multiple_of" in keys
        else None,
    )


def _parse_token(value: Value) -> Token:
    keys = value.keys(TOKEN_KEYS)
    row = _parse_row(keys["source"]) if "source" in keys else None
    force = keys["force"].flag() if "force" in keys else False
    if force and row is None:
        raise value.error("force needs a source, whose row all models have then")
    return Token(row, force)


def _parse_row(value: Value) -> TokenRow:
    if not isinstance(value.content, dict) or "kind" not in value.content:
        return TokenRow(parse_reference(value))
    keys = value.keys(ROW_KEYS)
    kind: Literal["zero", "model_token"] | str = keys["kind"].word(("zero", "model_token"))
    if kind == "zero":
        if len(keys) > 1:
            raise value.error("a row of kind zero has no other keys")
        return TokenRow()
    if "model" not in keys or ("token" in keys) == ("token_id" in keys):
        raise value.error("a row of kind model_token needs a model, and a token or a token_id")
    token = keys["token"].text() if "token" in keys else keys["token_id"].whole()
    return TokenRow(parse_reference(keys["model"]), token)
