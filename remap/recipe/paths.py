"""Which words of a recipe are paths, and how they become absolute."""

from pathlib import Path


def is_run(word: str) -> bool:
    """Whether a word names a run directory (or the task folder inside one)."""
    path = Path(word).expanduser()
    return (path / "task" / "task.json").is_file() or (path / "task.json").is_file()


def absolute_data(word: str) -> str:
    """An absolute data path; "digits" is no path."""
    return word if word == "digits" else absolute(word)


def absolute(word: str) -> str:
    return str(Path(word).expanduser().resolve())


def absolute_model(word: str) -> str:
    """An absolute path in ``local-dir:FOLDER`` or a run directory; the name of a model stays, whatever lies here."""
    if word.startswith("local-dir:"):
        return f"local-dir:{Path(word.removeprefix('local-dir:')).expanduser().resolve()}"
    return str(Path(word).expanduser().resolve()) if is_run(word) else word


def absolute_weights(word: str) -> str:
    """An absolute path of a weights file or run directory; "pretrained" and "none" stay."""
    return str(Path(word).expanduser().resolve()) if word.endswith(".safetensors") or is_run(word) else word
