"""Sphinx settings of the book. The pages are the executed chapters, staged by build.py; nothing is executed here."""

project = "w2vc"
author = "The w2vc authors"
copyright = "The w2vc authors, Apache-2.0"
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton", "sphinx-mathjax-offline"]
html_theme = "furo"
html_title = "w2vc"
html_static_path = ["_static"]
html_css_files = ["w2vc.css"]
html_favicon = "_static/favicon.svg"
html_show_search_summary = False  # a summary fetches pages, which no browser allows over file://
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
exclude_patterns = ["_build", "jupyter_execute"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # the default is a CDN
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "alert", "deflist", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]
