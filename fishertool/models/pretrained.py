"""transformers models by the class that config.json names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fishertool import hub
from fishertool.checkpoint.reader import load_json
from fishertool.errors import InputError
from fishertool.models.sentence import transformer_folder


def load_pretrained(source: str | Path, **options: Any) -> Any:
    """What `from_pretrained` of a checkpoint's own class gives, with these options."""
    folder = transformer_folder(hub.resolve(str(source)))
    return architecture(load_json(folder / "config.json"), folder).from_pretrained(
        folder, **options
    )


def skeleton(config: Mapping[str, Any], folder: Path) -> Any:
    """A checkpoint's model without values, on the meta device; the dense one, of a low-rank one.

    Raises InputError for an architecture that transformers does not have, or cannot make of this
    config.json.
    """
    import transformers

    made = architecture(config, folder)
    try:
        parsed = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return made(parsed)
    except (ValueError, KeyError, OSError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: transformers cannot make its model: {reason}") from error


def architecture(config: Mapping[str, Any], folder: Path) -> Any:
    """The transformers class that config.json names; InputError if transformers has none such."""
    import transformers

    names = config.get("architectures") or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise InputError(
            f"{folder / 'config.json'}: architecture {', '.join(names) or 'not given'} is not in "
            "transformers"
        )
    return found
