"""Sphinx settings of the book. The pages are the executed chapters, staged by build.py; nothing is executed here."""

import json
import re
from pathlib import Path

project = "w2vc"
author = "The w2vc authors"
copyright = "The w2vc authors, Apache-2.0"
language = "en"
extensions = [
    "myst_nb",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
]
html_theme = "furo"
html_title = "w2vc"
html_static_path = ["_static"]
html_extra_path = ["llms.txt"]
templates_path = ["_templates"]
html_css_files = ["w2vc.css"]
html_js_files = ["w2vc.js"]
html_favicon = "_static/favicon.svg"
html_show_search_summary = False  # a summary fetches pages, which no browser allows over file://
html_show_sphinx = False
html_copy_source = False
html_domain_indices = False  # api/index.md lists the modules
html_theme_options = {
    # No leaving the page by arrow keys: players and explorers need them.
    "navigation_with_keys": False,
    "light_css_variables": {"color-brand-primary": "#005a8c", "color-brand-content": "#005a8c"},
    "dark_css_variables": {"color-brand-primary": "#7cc7f0", "color-brand-content": "#7cc7f0"},
}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
exclude_patterns = ["_build", "jupyter_execute"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # the default is a CDN
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "alert", "deflist", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

# The pages of the modules
add_module_names = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False  # the types stand in the signatures
toc_object_entries_show_parents = "hide"
HERE = Path(__file__).resolve().parent
ANCHORS = json.loads((HERE / "anchors.json").read_text())  # module: [its chapter, the names in its cells]


def linkcode_resolve(domain, info):
    """Where an object is written: the cell of its chapter."""
    chapter, names = ANCHORS[info["module"].removeprefix("w2vc.")]
    name = info["fullname"].split(".")[0]
    return f"../{chapter}.html#code-{name}" if name in names else None


def docstring(*event):
    """Docstrings hold Markdown: code between single backticks, and no other marks."""
    lines = event[-1]
    for i, written in enumerate(lines):
        line = re.sub(r"^(\s*(?:\w+: )?)(?=\w\.(?:\s|$))", r"\1\\", written)  # "T." is no list
        pieces = re.split(r"(`[^`]+`)", line)
        pieces[::2] = [re.sub(r"[*|]|_(?!\w)", r"\\\g<0>", text) for text in pieces[::2]]
        pieces[1::2] = [f"`{code}`" for code in pieces[1::2]]
        lines[i] = "".join(pieces)


def skip(*event):
    """Leave out what says nothing: the fields of named tuples, documented by Python itself."""
    words = getattr(event[3], "__doc__", None) or ""
    return True if words.startswith("Alias for field number") else None


def parameters(app, pagename, templatename, context, doctree):
    """Long signatures: a line for each parameter, in elements that may stand in a term of a list; folded answers by their own name."""
    pattern = re.compile(r'(<span class="sig-paren">\(</span>)\s*<dl>(.*?)</dl>', re.S)
    rows = {"<dd>": '<span class="param">', "</dd>": "</span>"}
    context["body"] = pattern.sub(
        lambda m: m[1] + re.sub("</?dd>", lambda tag: rows[tag[0]], m[2]), context.get("body", "")
    ).replace('<summary aria-label="Toggle hidden content">', "<summary>")


def setup(app):
    app.connect("html-page-context", parameters)
    app.connect("autodoc-process-docstring", docstring, priority=1)  # before the Google sections are read
    app.connect("autodoc-skip-member", skip)
