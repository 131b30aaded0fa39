"""transformers models by the class that config.json names."""

from pathlib import Path
from typing import Any

from fishertool import hub
from fishertool.checkpoint.contents import read_contents
from fishertool.errors import InputError
from fishertool.models.names import architecture_of, model_class_of
from fishertool.models.sentence import transformer_folder


def load_pretrained(source: str | Path, **options: Any) -> Any:
    """What `from_pretrained` of a checkpoint's own class gives, with these options.

    Raises InputError for a class that transformers does not have.
    """
    checkpoint = read_contents(transformer_folder(hub.resolve(str(source))))
    model_class = model_class_of(checkpoint)
    if model_class is None:
        raise InputError(
            f"{checkpoint.folder / 'config.json'}: architecture "
            f"{architecture_of(checkpoint) or 'not given'} is not in transformers"
        )
    return model_class.from_pretrained(checkpoint.folder, **options)
