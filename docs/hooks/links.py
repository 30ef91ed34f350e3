"""Links of the pages to files outside of docs/, which GitHub shows and the site does not have.

With `repo_url` in mkdocs.yml they lead to the repository; without it, the file's path stands in
their place.
"""

import posixpath
import re

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """Replace a page's links that leave docs/."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(link: re.Match) -> str:
        text, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return link[0]
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return LINK.sub(replace, markdown)
