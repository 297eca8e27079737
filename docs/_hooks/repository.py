"""What the site shows of the repository outside docs/.

Pages link to the repository's files as they do on GitHub, by relative paths (`../csrc/README.md`). Each
such file becomes a page of the site under source/ (Markdown as it is, anything else as code, images as
themselves), and so does what those pages link to in turn; links are bent to them. Fences that open with
"python run" are Python to the highlighter.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
COPIES = "source/"
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")  # the path in [text](path#anchor) and ![text](path)
_IMAGES = {".png", ".svg", ".jpg"}
_ROLE = re.compile(r":(?:class|func|meth|mod|attr):(?=<code>)")  # :class:`QLinear`, of docstrings
_FENCE = re.compile(r"^```python run\s*$", re.MULTILINE)


def _beside(path: str, link: str) -> str:
    """Where a link of the file at `path` leads; both, as all here, relative to the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _is_outside(path: str) -> bool:
    """Whether it is a file of the repository that docs/ does not have."""
    return not path.startswith(("docs/", "../")) and (ROOT / path).is_file()


def _uri(path: str) -> str:
    """The name of a file in the site's sources."""
    if not _is_outside(path):
        return posixpath.relpath(path, "docs")
    suffix = PurePosixPath(path).suffix
    return f"{COPIES}{path}" + ("" if suffix in _IMAGES | {".md"} else ".md")


def _path(uri: str) -> str:
    """The file that a page of Markdown was made from."""
    return uri.removeprefix(COPIES) if uri.startswith(COPIES) else f"docs/{uri}"


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/."""
    pages = [_path(file.src_uri) for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for link in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            target = _beside(page, link)
            uri = _uri(target)
            if not _is_outside(target) or files.get_file_from_path(uri):
                continue
            if target.endswith(".md"):
                pages.append(target)
            content: str | bytes = (ROOT / target).read_bytes()
            if uri != COPIES + target:
                code, language = (ROOT / target).read_text(encoding="utf-8"), PurePosixPath(target).suffix[1:]
                content = f"# {target}\n\n````{language}\n{code}\n````\n"
            files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Bend links, and name fences as the highlighter knows them."""
    here = _path(page.file.src_uri)

    def bent(link: re.Match[str]) -> str:
        target = _beside(here, link[1])
        if here.startswith("docs/") and not _is_outside(target):
            return link[1]
        return posixpath.relpath(_uri(target), posixpath.dirname(page.file.src_uri))

    return _LINK.sub(bent, _FENCE.sub("```python", markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles before names in docstrings."""
    return _ROLE.sub("", html)
