"""Every runnable example of the documentation runs."""

import traceback

import doc_examples
import pytest
import torch
from needs import fsdp_of_bytes, patches_bitsandbytes

NEED = {"bitsandbytes": patches_bitsandbytes, "distributed": fsdp_of_bytes}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=NEED.get(page.stem, ())) for page in doc_examples.pages()],
)
def test_page(page, tmp_path, monkeypatch):
    lacking = doc_examples.missing(page)
    if lacking:
        pytest.skip(f"{page.name} needs {', '.join(lacking)}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    doc_examples.run(page)


def test_fences_are_found_and_run_in_one_namespace(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python run\nx = 2\n```\n\n```python\nx = 0 / 0\n```\n"
        "```python run\nassert x == 2\ny = x + 1\n```\n"
    )
    assert [(one.line, one.code) for one in doc_examples.examples(page)] == [
        (4, "x = 2"),
        (11, "assert x == 2\ny = x + 1"),
    ]
    assert doc_examples.run(page)["y"] == 3


def test_an_error_points_into_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python run\n\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        doc_examples.run(page)
    frame = traceback.extract_tb(caught.tb)[-1]
    assert (frame.filename, frame.lineno) == (str(page), 5)


def test_an_open_fence_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n```python run\nx = 1\n")
    with pytest.raises(ValueError, match="expected the fence of line 2 to be closed"):
        doc_examples.examples(page)


def test_what_a_page_needs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python run\nimport torch\nimport nothing_such.part\nfrom nor_this import it\n```\n")
    assert doc_examples.missing(page) == ["nor_this", "nothing_such"]
