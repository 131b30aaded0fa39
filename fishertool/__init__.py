"""Fisher-guided surgery on Hugging Face checkpoints.

After `import fishertool`, transformers' own `from_pretrained` loads low-rank checkpoints too.
"""

from pathlib import Path
from typing import Any

from fishertool import plugin

__all__ = ["__version__", "load_model"]

__version__ = "0.1.0"

plugin.install()


def load_model(source: str | Path, **options: Any) -> Any:
    """The transformers model of a folder or Hub id, low-rank or not, in eval mode.

    Its class is the one that config.json names; `options` are those of `from_pretrained`, such as
    dtype and device_map. Of a sentence-transformers folder, the transformer.
    """
    from fishertool.models.pretrained import load_pretrained

    return load_pretrained(source, **options)
