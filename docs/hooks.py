"""What MkDocs makes beside what is written: the API reference, and links to it from the chapters."""

import re
import sys
from pathlib import Path

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).resolve().parent))
import api

log = get_plugin_logger("docs/hooks.py")


def on_files(files, config):
    """Add the pages of the API reference."""
    texts = {"api/index.md": api.index()} | {f"api/{page}.md": api.text_of(page) for page in api.pages()}
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """A chapter's links to its entries."""
    if not (found := api.of_chapter(page.file.src_uri)):
        return markdown
    return re.sub(r"^(?=## Sources$)", lambda _: found + "\n\n", markdown, count=1, flags=re.MULTILINE)


def on_page_content(html, page, config, files):
    """Of the reference, names and first lines are searched: every first visit loads the index."""
    if not (uri := page.file.src_uri).startswith("api/"):
        return html
    for module in api.pages().get(uri.removeprefix("api/").removesuffix(".md"), ("", ()))[1]:
        for name in api.names(module)[0]:
            if f'id="{module}.{name}"' not in html:
                log.warning("%s has no entry for %s.%s", uri, module, name)
    return re.sub(
        r'<dl>|<div class="(?:[\w-]+ )?highlight">',
        lambda m: f'{m[0][:-1]} data-search-exclude="detail">',
        html,
    )
