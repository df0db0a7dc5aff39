"""The tutorial: code and each language's words put together as a notebook, run, and shown as a page.

``python -m kvbench.publication.tutorial workflow/notebooks`` writes the notebooks of all languages
anew, without outputs. The code stands once, in percent format (``# %% name``); each language has a
file of words in Markdown that says with ``<!-- cell: name -->`` where a cell belongs, and whose head
gives the labels that the code prints.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from kvbench import documents
from kvbench.errors import InputError

if TYPE_CHECKING:
    from nbformat import NotebookNode

#: Seconds after which a cell is given up.
LIMIT_S = 300
_CELL = re.compile(r"^# %% (\w+)$", re.MULTILINE)
_PLACE = re.compile(r"^<!-- cell: (\w+) -->$", re.MULTILINE)
_HEAD = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def build(code: Path, words: Path, language: str) -> NotebookNode:
    """Put code and words together.

    Parameters
    ----------
    code:
        The file of cells.
    words:
        The file of words in one language.
    language:
        Written into the notebook's metadata.

    Raises
    ------
    InputError
        A cell that no word file places, or places twice; a place without a cell; a label that is
        missing.
    """
    import jinja2
    import nbformat

    cells = _cells(code)
    head = _HEAD.match(words.read_text(encoding="utf-8"))
    if head is None:
        raise InputError(f"{words}: begin with the labels of the code, between two lines of ---")
    labels = yaml.safe_load(head[1])
    body = words.read_text(encoding="utf-8")[head.end() :]
    parts = _PLACE.split(body)
    placed = parts[1::2]
    odd = sorted(set(cells).symmetric_difference(placed))
    if odd or len(placed) != len(cells):
        named = odd[0] if odd else max(placed, key=placed.count)
        raise InputError(
            f"{words}: the cell {named!r} must be placed once and stand in {code.name}"
        )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
        "language": language,
    }
    for number, text in enumerate(parts[0::2]):
        if text.strip():
            notebook.cells.append(nbformat.v4.new_markdown_cell(text.strip()))
        if number < len(placed):
            name = placed[number]
            try:
                source = environment.from_string(cells[name]).render(labels)
            except jinja2.UndefinedError as error:
                raise InputError(f"{words}: {error}; the cell {name!r} needs this label") from None
            notebook.cells.append(nbformat.v4.new_code_cell(source))
    for number, cell in enumerate(notebook.cells):
        # Random ids would make every build another file.
        cell["id"] = f"cell-{number}"
    return notebook


def _cells(code: Path) -> dict[str, str]:
    parts = _CELL.split(code.read_text(encoding="utf-8"))
    names = parts[1::2]
    if len(set(names)) != len(names):
        raise InputError(f"{code}: two cells are called {max(names, key=names.count)!r}")
    return {name: text.strip() for name, text in zip(names, parts[2::2], strict=True)}


def run(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in this interpreter's environment; outputs are stored in the notebook.

    Parameters
    ----------
    folder:
        Working folder of the kernel.

    Raises
    ------
    InputError
        A cell failed, with the last line of its error, or took longer than ``LIMIT_S``.
    """
    import os

    import nbclient

    library = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH", "")]))
    client = nbclient.NotebookClient(
        notebook, timeout=LIMIT_S, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    try:
        client.execute(env={**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable})
    except nbclient.exceptions.CellTimeoutError:
        raise InputError(
            f"the tutorial stopped: a cell took longer than {LIMIT_S} s; run it again when nothing else "
            "measures or works on this machine"
        ) from None
    except nbclient.exceptions.CellExecutionError as error:
        raise InputError(f"the tutorial stopped: {str(error).strip().splitlines()[-1]}") from None
    for cell in notebook.cells:
        # Moments of execution would make two equal runs differ.
        cell.metadata.pop("execution", None)


def write(notebook: NotebookNode, target: Path) -> None:
    """Write the notebook file."""
    import nbformat

    nbformat.validate(notebook)
    documents.write_text_atomic(target, nbformat.writes(notebook) + "\n")


def page(notebook: NotebookNode, target: Path, language: str) -> None:
    """Write the notebook as one HTML page that needs no network."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab")
    exporter.mathjax_url = exporter.require_js_url = exporter.mermaid_js_url = ""
    exporter.jquery_url = ""
    exporter.language_code = "pt-BR" if language == "pt" else "en"
    body, _ = exporter.from_notebook_node(notebook)
    documents.write_text_atomic(target, body)


def main(folder: Path) -> None:
    """Write ``tutorial.<language>.ipynb`` beside code and words, for every language."""
    for words in sorted(folder.glob("tutorial.*.md")):
        language = words.suffixes[0].removeprefix(".")
        write(build(folder / "tutorial.py", words, language), words.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
