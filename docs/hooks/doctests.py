"""Doctests of docstrings as blocks of code: in Markdown, `>>>` would begin three quotations."""

import re

from griffe import Extension, Object

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Doctests(Extension):
    """Put a fence around each doctest."""

    def on_object(self, *, obj: Object, **_) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
