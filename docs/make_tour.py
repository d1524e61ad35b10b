"""Runs docs/tour.md from top to bottom and writes what it makes: its pictures, its printed lines, docs/tour.ipynb.

The page is the source. A block of python is a cell of the notebook, what stands between two blocks another. In the
page, a block of text after one of python holds what that one prints; in the notebook there are neither those nor the
pictures, which its cells make anew when they run.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "tour.md", ROOT / "docs" / "tour.ipynb"
SECONDS = 600  # that a cell may take
CODE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"\A\s*```text\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"^!\[.*?\]\((.*?)\)\n\n?", re.MULTILINE)


class Cell(NamedTuple):
    """A block of python, and the text that follows it in the page."""

    code: str
    text: str


def cells(page: str) -> tuple[str, list[Cell]]:
    """What stands before the first block of python, and all blocks."""
    head, *parts = CODE.split(page)
    return head, [Cell(code, text) for code, text in zip(parts[::2], parts[1::2], strict=True)]


def pictures(page: str) -> list[str]:
    """The paths of the pictures that the page shows, relative to its folder."""
    return PICTURE.findall(page)


def notebook(page: str) -> dict[str, Any]:
    """The page as a notebook of format 4, without outputs."""
    head, blocks = cells(page)
    contents = [("markdown", head)]
    for code, text in blocks:
        contents += [("code", code), ("markdown", PICTURE.sub("", PRINTED.sub("", text)))]
    made = []
    for i, (kind, content) in enumerate((kind, content.strip()) for kind, content in contents):
        if content:
            outputs: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
            made.append({"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": content, **outputs})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def execute(nb: dict[str, Any], folder: Path) -> list[str]:
    """Runs a notebook in a fresh process, whose working directory is `folder`.

    Returns:
        what each cell of code prints.

    Raises:
        nbclient.exceptions.CellExecutionError: when one fails.
    """
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.from_dict(nb)
    NotebookClient(
        node, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
        for cell in node.cells
        if cell.cell_type == "code"
    ]


def with_printed(page: str, printed: list[str]) -> str:
    """The page with what its blocks print in the blocks of text that follow them."""
    head, blocks = cells(page)
    parts = [head]
    for (code, text), lines in zip(blocks, printed, strict=True):
        parts.append(f"```python\n{code}```\n{PRINTED.sub(lambda _, lines=lines: _text(lines), text)}")
    return "".join(parts)


def _text(lines: str) -> str:
    return f"\n```text\n{lines.rstrip()}\n```\n"


def main() -> None:
    page = PAGE.read_text()
    sys.path.insert(0, str(ROOT))
    from src.files import replacing

    page = with_printed(page, execute(notebook(page), PAGE.parent))
    for path, content in ((PAGE, page), (NOTEBOOK, json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n")):
        with replacing(path) as temporary:
            temporary.write_text(content)
    for picture in pictures(page):
        print(f"  docs/{picture}: {(PAGE.parent / picture).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
