"""A section of the reference pages for one method or loss: its drawing, its docstring with the formula, its options."""

import inspect
import re
from typing import Any

import drawings

from remap.recipe.option_listing import options_of, rows_of_config, shown

LEGEND = (
    "In the drawings orange is trained, or is what a loss compares; grey is frozen, or only passed through; blue is\n"
    "the teacher's. The text is the docstring of the class, beside the code; tests hold each formula in float64."
)


def method_section(row: Any) -> str:
    """Return the section of a row of the table of methods."""
    count = "" if row.vit_base is None else f" ({row.vit_base:,} on ViT-B/16)"
    source = paper(row.paper)
    facts = f"{source[0].upper()}{source[1:]}. Trained: {escaped(row.trains.replace('*', '·'))}{count}."
    kind = drawings.of_method(row)
    drawing = f"![{drawings.KINDS[kind].says}](drawings/{kind}.svg)" if kind else ""
    return _section(row, facts, drawing, options_of(row.name))


def loss_section(row: Any) -> str:
    """Return the section of a row of the table of losses."""
    facts = f"{paper(row.paper)}. Weight {row.weight:g}." if row.paper != "-" else f"Weight {row.weight:g}."
    drawing = f"![{row.name} reads: {row.needs}](drawings/{drawings.loss_kind(row)}.svg)"
    return _section(row, facts, drawing, rows_of_config(row.load().Config))


def _section(row: Any, facts: str, drawing: str, options: list[dict]) -> str:
    parts = [f"### `{row.name}`", f"{row.summary[0].upper()}{row.summary[1:]}. {facts}", drawing]
    parts += [*_prose(row.load().__doc__ or ""), f"Options:{listed(options)}"]
    return "\n" + "\n\n".join(filter(None, parts))


def _prose(docstring: str) -> list[str]:
    """Return the paragraphs of a docstring as Markdown; what is laid out by hand keeps its lines."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    kept = []
    for text in paragraphs:
        if text.startswith(("Attributes:", "Args:")):
            break
        kept.append(f"```text\n{text}\n```" if "====" in text or text.startswith("    ") else _line(text))
    return [f"> {kept[0]}", *kept[1:]] if kept else []


def _line(text: str) -> str:
    """One paragraph: code as code, arXiv numbers as links, all other characters as they are."""
    words = re.split(r"(``.+?``)", " ".join(text.split()))
    return "".join(f"`{one[2:-2]}`" if one.startswith("``") else _linked(escaped(one)) for one in words)


def escaped(text: str) -> str:
    return re.sub(r"([\\*_<\[\]|`])", r"\\\1", text)


def _linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})( and (\d{4}\.\d{4,5}))?", _links, text)


def _links(found: re.Match[str]) -> str:
    return " and ".join(f"[{one}](https://arxiv.org/abs/{one})" for one in (found[1], found[3]) if one)


def paper(text: str) -> str:
    """Return a row's paper with its link."""
    words, _, number = text.rpartition("arXiv ")
    return f"{words.rstrip(', ')}, [{number}](https://arxiv.org/abs/{number})" if words else text


def listed(options: list[dict]) -> str:
    """Return options as items of a list, with their defaults."""
    if not options:
        return " none"
    return "\n\n" + "\n".join(f"- `{o['name']}={shown(o['default'])}`{_explained(o)}" for o in options)


def _explained(option: dict) -> str:
    """The words it takes, and a line on it where its class has one."""
    allowed = ", ".join(map(str, option["allowed"] or ()))
    words = f" ({'list of ' if option['type'].startswith('list') else ''}{allowed})" if allowed else ""
    return words + (f": {option['about']}" if option["about"] else "")
