"""docs/tour.md and docs/tour.ipynb: one text, which runs from top to bottom."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from docs.make_tour import NOTEBOOK, PAGE, ROOT, cells, execute, notebook, pictures, with_printed

FAST = {  # a twentieth of the training, and of the sampling the times that are looked at
    "STEPS = 400\n": "STEPS = 20\n",
    "for t in reversed(range(T)):": "for t in (999, 700, 500, 400, 300, 200, 100, 50, 0):",
}
EXAMPLE = """# One

```python
print(1)
```

```text
0
```

![a](images/a.png)

Two.

```python
x = 2
```
"""


def test_a_page_becomes_a_notebook():
    """Catches cells out of order, and pictures and printed lines of another run in the notebook."""
    made = [(cell["cell_type"], cell["source"]) for cell in notebook(EXAMPLE)["cells"]]
    assert made == [("markdown", "# One"), ("code", "print(1)"), ("markdown", "Two."), ("code", "x = 2")]
    assert pictures(EXAMPLE) == ["images/a.png"]


def test_what_blocks_print_comes_into_the_page():
    page = with_printed(EXAMPLE, ["1\n2\n", "not shown"])
    assert "```text\n1\n2\n```\n\n![a]" in page
    assert with_printed(page, ["0\n", ""]) == EXAMPLE


def test_page_and_notebook_agree():
    """A page that was changed without `make tour`."""
    assert json.loads(NOTEBOOK.read_text()) == notebook(PAGE.read_text())


def test_each_picture_of_the_page_is_there_is_small_and_is_made_by_it():
    page = PAGE.read_text()
    code = "".join(cell.code for cell in cells(page)[1])
    assert sorted(pictures(page)) == sorted(f"images/tour/{p.name}" for p in (ROOT / "docs/images/tour").iterdir())
    for path in pictures(page):
        assert (PAGE.parent / path).stat().st_size < 100_000, path
        assert f'"{Path(path).name}"' in code


def test_the_tour_runs_from_top_to_bottom(monkeypatch, tmp_path):
    """In a fresh process, with less training and sampling.

    The page asserts itself that its betas, q_sample and p_losses are those of src.diffusion.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    page = PAGE.read_text()
    fast = page
    for slow, quick in FAST.items():
        assert page.count(slow) == 1
        fast = fast.replace(slow, quick)
    printed = "".join(execute(notebook(fast), tmp_path))
    assert "1,006,529 parameters" in printed
    losses = [float(loss) for loss in re.findall(r"t: (\d\.\d+)", printed)]
    assert len(losses) == 2
    assert max(losses) < 0.8
    for path in pictures(page):
        assert Image.open(tmp_path / path).size == Image.open(PAGE.parent / path).size, path


def test_a_block_that_fails_is_not_passed_over(tmp_path):
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(notebook("```python\n1 / 0\n```\n"), tmp_path)
