"""A Markdown extension: long code, whole files of the layers, stays out of the search index.

Every first visit loads the index. With all code it was 0.8 of a page's 1.1 MB, and grew with each chapter.
"""

import re

from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

LINES = 24  # cells, stubs and solutions are shorter
BLOCK = re.compile(r'<div class="highlight">(?=(.*?)</div>)', re.DOTALL)


class LongCode(Postprocessor):
    def run(self, text):
        """Mark the blocks; Material's search plugin reads the mark and takes it out again."""
        long = lambda block: block[1].count('name="__codelineno-') > LINES
        return BLOCK.sub(
            lambda b: '<div class="highlight" data-search-exclude="code">' if long(b) else b[0], text
        )


class Unsearched(Extension):
    def extendMarkdown(self, md):
        md.postprocessors.register(LongCode(md), "unsearched", 1)  # after the raw HTML is back


def makeExtension(**options):
    """What Markdown calls."""
    return Unsearched(**options)
