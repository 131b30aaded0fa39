"""transformers models by the class that config.json names."""

from pathlib import Path
from typing import Any

from fishertool import hub
from fishertool.checkpoint.json_files import load_json
from fishertool.errors import InputError
from fishertool.models.sentence import transformer_folder


def load_pretrained(source: str | Path, **options: Any) -> Any:
    """What `from_pretrained` of a checkpoint's own class gives, with these options.

    Raises InputError for a class that transformers does not have.
    """
    import transformers

    folder = transformer_folder(hub.resolve(str(source)))
    names = load_json(folder / "config.json").get("architectures") or []
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        raise InputError(
            f"{folder / 'config.json'}: architecture {', '.join(names) or 'not given'} is not in "
            "transformers"
        )
    return architecture.from_pretrained(folder, **options)
