"""A conversation on disk: a session of the context (`Llama.save_session`) with the dialogue as its data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gearcpp.errors import DataError

if TYPE_CHECKING:
    from gearcpp import Llama
    from gearcpp.cli._conversation import Dialogue


def save_session(path: Path, llm: Llama, dialogue: Dialogue) -> int:
    """Write the conversation; whatever happens, `path` is the old file or the whole new one.

    Returns:
        Bytes written.

    Raises:
        GearError: the file cannot be written.
    """
    return llm.save_session(path, {"dialogue": dialogue.to_dict()})


def load_session(path: Path, llm: Llama) -> Dialogue:
    """Restore the KV cache and return the dialogue. Nothing is changed unless the whole file is sound and fits this model and cache.

    Raises:
        DataError: the file is missing, damaged, foreign or of another version, belongs to another model or cache type, or does not fit into the context.
    """
    from gearcpp.cli._conversation import Dialogue
    from gearcpp.runtime.sessions import read_data

    try:
        dialogue = Dialogue(**read_data(path)["dialogue"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} holds a context, but no conversation: it was not saved by gearcpp chat") from error
    llm.load_session(path)
    return dialogue
