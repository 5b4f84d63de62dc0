"""What MkDocs makes beside what is written: the API reference, notebooks, links to them from the chapters."""

import re
import sys
from pathlib import Path

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).resolve().parent))
import api
import notebook

log = get_plugin_logger("docs/hooks.py")


def on_files(files, config):
    """Add the pages of the API reference, and a notebook beside every chapter."""
    texts = {"api/index.md": api.index()} | {f"api/{page}.md": api.text_of(page) for page in api.pages()}
    for file in files.documentation_pages():
        if notebook.is_chapter(file.src_uri, file.content_string):
            texts[notebook_of(file.src_uri)] = notebook.notebook_json(file.content_string)
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    return files


def notebook_of(uri):
    return uri.removesuffix(".md") + ".ipynb"


def on_page_markdown(markdown, page, config, files):
    """A chapter's links: under its title to its notebook and its entries; before its sources the entries."""
    uri, links = page.file.src_uri, []
    if files.get_file_from_path(book := notebook_of(uri)):
        name = book.rsplit("/", 1)[-1]
        links.append(f'[Download as notebook]({name}){{ download="{name}" }}')
    if found := api.of_chapter(uri):
        links.append("[API](#api)")
        end = r"^(?=## Sources$)|\Z"
        markdown = re.sub(end, lambda _: f"\n{found}\n\n", markdown, count=1, flags=re.MULTILINE)
    if not links:
        return markdown
    title, _, rest = markdown.lstrip().partition("\n")
    return f"{title}\n\n{' · '.join(links)}\n{rest}"


def on_page_content(html, page, config, files):
    """Of the reference only names are searched, of techniques' own sections in `ref` the first lines too.

    Every first visit loads the index.
    """
    if not (uri := page.file.src_uri).startswith("api/"):
        return html
    name = uri.removeprefix("api/").removesuffix(".md")
    for module in api.pages().get(name, ("", ()))[1]:
        for entry in api.names(module)[0]:
            if f'id="{module}.{entry}"' not in html:
                log.warning("%s has no entry for %s.%s", uri, module, entry)
    layer, _, part = name.partition("/")
    detail = r'<dl>|<div class="(?:[\w-]+ )?highlight">' + (
        "" if layer == "ref" and part in api.PARTS else "|<p>"
    )
    return re.sub(detail, lambda m: f'{m[0][:-1]} data-search-exclude="detail">', html)
