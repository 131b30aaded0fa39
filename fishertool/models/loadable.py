"""Whether transformers would load a checkpoint as it is, by its names and shapes."""

from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import FishertoolError
from fishertool.models.loading import faults_of, has_accelerate, quieten
from fishertool.models.names import architecture_of, model_class_of, reason_of


def cannot_be_tried(checkpoint: Checkpoint) -> str | None:
    """Why transformers has nothing to load it with, if so.

    Raises InputError for a config.json that is missing or no JSON.
    """
    if model_class_of(checkpoint) is not None:
        return None
    named = architecture_of(checkpoint)
    if not named:
        return "config.json names no architecture"
    return f"architecture {named} is not in transformers"


def loading_faults(checkpoint: Checkpoint) -> list[str]:
    """What is missing, left over or of another shape when its architecture is loaded from it.

    The weights get no values where accelerate, which that needs, is installed.
    """
    import transformers

    quieten(transformers)
    model_class = model_class_of(checkpoint)
    try:
        _, found = model_class.from_pretrained(
            checkpoint.folder,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told by name
            local_files_only=True,
            use_safetensors=True,
            device_map="meta" if has_accelerate() else None,
        )
    except FishertoolError as error:  # of the low-rank plug-in
        return [str(error)]
    except Exception as error:  # a configuration may raise anything
        return [f"transformers cannot load it: {reason_of(error)}"]
    return faults_of(checkpoint, model_class.__name__, found)
