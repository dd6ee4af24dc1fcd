"""Sphinx's settings for the course as a web site; `build.py` calls Sphinx with them."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "evolq_lite"
author = "evolq_lite contributors"
project_copyright = "evolq_lite contributors, MIT license"
language = "en"

extensions = ["myst_nb"]
nb_execution_mode = "off"  # the outputs that are stored in the notebooks
# Annotations are linked by their last name, and two modules have a `Row` and a `Run`.
suppress_warnings = ["ref.python"]
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4  # as on GitHub
myst_update_mathjax = False

html_theme = "furo"
html_title = "evolq_lite"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_domain_indices = False  # docs/modules.md is better
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7db8f2", "color-brand-content": "#7db8f2"},
}


def mathml(tex: str, as_block: bool) -> str:
    """A formula as MathML, which browsers draw themselves: no script, no fonts from elsewhere."""
    # docutils knows no \big; parentheses grow by themselves.
    return tex2mathml(re.sub(r"\\[bB]ig+[lrm]?(?![a-zA-Z])", "", tex).strip(), as_block=as_block)


def visit_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
