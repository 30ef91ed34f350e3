"""What the HTML reports share: the page around a report, escaped text, cards and images.

A page is a single file that loads nothing: plots are inline SVG, images are data URIs, and its
content policy forbids all requests, and all scripts but the one that the page is made with. What
models, data and settings say may be hostile, so it enters a page through `text` alone, or through
`data_block`, which only that script reads.
"""

import base64
import hashlib
import html
import io
import json
import re
from pathlib import Path
from string import Template

from PIL import Image

from .svg import DARK, LIGHT

LONGEST_TEXT = 2000
"""The most characters of a text that a report shows."""

IMAGE_SIDE = 448
"""Images with a longer side are scaled down to this many pixels, so that the page stays small."""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:$script_policy">$refresh
<title>$model · $about</title><style>
:root { color-scheme: light dark; $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 74rem; background: var(--page);
  color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.05rem; font-weight: 500; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
.headline { font: 700 clamp(1.7rem, 6vw, 2.7rem)/1.15 system-ui, sans-serif; text-wrap: balance;
  margin: .5rem 0; }
.soft, thead th { color: var(--soft); font-size: .875rem; font-weight: 400; margin: .4rem 0; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; padding: 1rem;
  margin: 0; }
.stack { display: grid; gap: 1rem; } .grid > *, .stack > * { min-width: 0; }
.scroll { overflow-x: auto; overflow-wrap: break-word; }
.scroll td:first-child { white-space: nowrap; padding-right: 1rem; }
.grid { display: grid; gap: 1rem; --column: 20rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--column)), 1fr)); }
.wide-grid { --column: 30rem; }
figcaption, .question, summary { font-weight: 600; margin: 0 0 .25rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
table { border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
table.card { max-width: 44rem; overflow-wrap: normal; }
details table { font-size: .875rem; line-height: 1.2; }
th, td { text-align: left; vertical-align: top; padding: .5rem .5rem .5rem 0;
  border-top: 1px solid var(--grid); }
thead th, tbody:first-child tr:first-child > * { border-top: 0; }
td > b { font-size: 1.25rem; }
.bar { display: block; position: relative; height: 6px; margin: .5rem 0; border-radius: 3px;
  background: var(--grid); }
.bar i { position: absolute; height: 100%; border-radius: 3px; min-width: 4px;
  background: var(--line0); opacity: .5; }
.bar i + i { margin-left: -2px; opacity: 1; } .wide { width: 50%; }
.images { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .75rem; }
.images img { max-width: 100%; min-width: 168px; height: auto; border-radius: 6px; }
.mark { font-weight: 600; padding: .05rem .5rem; border: 1px solid; border-radius: 1rem;
  white-space: nowrap; }
.right { color: var(--good); } .wrong { color: var(--bad); border-style: dashed; }
.tiles { margin-top: 1.25rem; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); }
.tiles .card { padding: .7rem 1rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tiles small { font-size: .875rem; font-weight: 400; white-space: nowrap; }
.tiles .soft { margin: 0; } a { color: var(--line0); }
.filters { display: grid; gap: .6rem 1rem; align-items: end; position: sticky; top: 0; z-index: 1;
  margin: 1.25rem 0 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9rem), 1fr)); }
.filters label { display: block; color: var(--soft); font-size: .8125rem; min-width: 0; }
.filters .range { display: flex; gap: .4rem; } .filters .search { grid-column: span 2; }
input, select, button { font: inherit; font-size: .9375rem; color: var(--ink); width: 100%;
  min-width: 0; background: var(--page); border: 1px solid var(--grid); border-radius: 6px;
  padding: 0 .5rem; height: 2.2rem; }
button { cursor: pointer; } .more { margin: 1rem auto; width: auto; display: block;
  padding: 0 1.5rem; background: var(--card); } [hidden] { display: none !important; }
@media (max-width: 40rem) { .filters { position: static;
  grid-template-columns: 1fr 1fr; } }
.output { white-space: pre-wrap; font: .8125rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace;
  max-height: 14rem;
  overflow: auto; background: var(--page); border-radius: 6px; padding: .5rem .6rem;
  unicode-bidi: isolate; }
</style></head><body><main>
<h1>$model · <span class="soft">$about</span></h1>
<p class="headline">$headline</p><p class="soft">$progress</p>
$sections
</main>$script</body></html>
""")

# Control characters, direction overrides and surrogates would garble the page, or could not be
# written at all.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)

# Characters that mean something in HTML, and line ends of JavaScript that JSON has not.
_MARKUP = "<>&\u2028\u2029"


def html_page(
    *,
    model: str,
    about: str,
    headline: str,
    progress: str,
    sections: str,
    script: str = "",
    refresh: int = 0,
) -> str:
    """The whole page; all arguments but the last two are HTML.

    `model` and `about` make the title, `headline` is the result in large letters, and `progress`
    stands below it. `script` is the JavaScript of the page, the only one that its content policy
    lets run, by its hash. A browser loads the page again after `refresh` seconds, if that is not 0.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    again = f'\n<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return _PAGE.substitute(
        light=_declarations(LIGHT),
        dark=_declarations(DARK),
        model=model,
        about=about,
        headline=headline,
        progress=progress,
        sections=sections,
        script=script and f"<script>{script}</script>",
        script_policy=script and f"; script-src 'sha256-{digest}'",
        refresh=again,
    )


def _declarations(colours: dict[str, str]) -> str:
    return " ".join(f"{name}: {colour};" for name, colour in colours.items())


def printable(value: object, longest: int = LONGEST_TEXT) -> tuple[str, str]:
    """`value` as text with unprintable characters replaced by visible ones, and a note.

    A text of more than `longest` characters is cut, which the note says; otherwise it is "".
    """
    whole = str(value).replace("\r\n", "\n")
    shown = _UNPRINTABLE.sub(_stand_in, whole[:longest])
    if len(whole) <= longest:
        return shown, ""
    return shown, f" … cut: {longest:,} of {len(whole):,} characters shown"


def _stand_in(found: re.Match) -> str:
    """Unicode's picture of a control character, or the replacement character."""
    return chr(0x2400 + ord(found[0])) if found[0] < " " else "\ufffd"


def text(value: object) -> str:
    """`value` as HTML that shows it as text, markup included, and with a note if it is cut."""
    shown, note = printable(value)
    return html.escape(shown) + (note and f'<span class="soft">{note}</span>')


def data_block(value: object) -> str:
    """`value` as an element of JSON, which a browser does not run, for a page's script to read.

    No character of it can end the element or begin another.
    """
    written = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in _MARKUP:
        written = written.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="data">{written}</script>'


def section(title: str, content: str, note: str = "") -> str:
    """A heading, a note in soft letters, and `content`; all three are HTML."""
    note = note and f'<p class="soft">{note}</p>'
    return f"<section><h2>{title}</h2>{note}{content}</section>"


def tile(label: str, value: str, unit: str = "", note: str = "") -> str:
    """A card with a number in large letters; all arguments are HTML."""
    shown = f"<b>{value} <small>{unit}</small></b>"
    return f'<div class="card"><p class="soft">{label}</p>{shown}<p class="soft">{note}</p></div>'


def bar(value: float, low: float, high: float) -> str:
    """A bar that shows a share and its interval, all between 0 and 1."""
    return f"""<span class="bar"><i style="left:{low:.2%};width:{high - low:.2%}"></i>\
<i style="left:{value:.2%}"></i></span>"""


def answer(label: str, output: object, correct: bool | None, why: object = "") -> str:
    """A model's output, below a label and the verdict with its reason; `label` is HTML.

    An output that was not judged, whose `correct` is None, has no verdict.
    """
    verdict, sign = ("right", "✓") if correct else ("wrong", "✗")
    shown = text(output) or '<span class="soft">(empty)</span>'
    mark = "" if correct is None else f'<b class="mark {verdict}">{sign} {verdict}</b>'
    mark += f" {text(why)}" if why else ""
    return f'<p class="soft">{label} {mark}</p><div class="output">{shown}</div>'


def sample_card(images: str, problem: object, solution: object, answers: str) -> str:
    """A card with an item and what models answered; `images` and `answers` are HTML."""
    images = images and f'<div class="images">{images}</div>'
    return f"""<article class="card">{images}
<p class="question">{text(problem)}</p>
<p class="soft">Right answer: <b>{text(solution)}</b></p>{answers}</article>"""


def settings_table(values: dict) -> str:
    """A table of all settings, which is folded until the reader opens it."""
    rows = "".join(
        f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in values.items()
    )
    summary = f"<summary>All {len(values)} settings</summary>"
    return f'<details class="card">{summary}<table><tbody>{rows}</tbody></table></details>'


def image(folder: Path, name: str) -> str:
    """The image `name` of `folder`, as an element with a data URI; a note if it cannot be shown."""
    try:
        path = (folder / name).resolve()
        # The page may be passed on, so nothing from outside of the folder may get into it.
        if not path.is_relative_to(folder.resolve()):
            raise ValueError("outside the folder")
        if not path.is_file():
            raise ValueError("no regular file")
        # Logs write PNG; for some other formats Pillow starts a program.
        with Image.open(path, formats=("PNG",)) as opened:
            picture = opened.convert("RGB")
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return f'<span class="soft">image {text(name)} cannot be shown</span>'

    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="" src="data:image/png;base64,{data}">'
