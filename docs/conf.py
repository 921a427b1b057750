"""The site: `python -m sphinx -W --keep-going docs docs/_build/html` runs all tutorials and builds it."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
# The tutorials call `brainflow` and `python`: those of this environment.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "88", "NO_COLOR": "1"}
os.environ["IPYTHONDIR"] = str(HERE / "_build" / "ipython")

project = "brainflow"
author = copyright = "brainflow developers"
release = version = installed("brainflow-fmri")
extensions = ["myst_nb", "sphinx.ext.autodoc", "numpydoc", "sphinx_copybutton"]
exclude_patterns = ["_build", "README.md"]
html_theme = "furo"
html_title = f"brainflow {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#7a2e1d", "color-brand-content": "#9a3b26"},
    "dark_css_variables": {"color-brand-primary": "#f2a48f", "color-brand-content": "#f2a48f"},
}
default_role = "code"
pygments_style, pygments_dark_style = "friendly", "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Every code cell runs, in a folder of its own for each page; an error ends the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "cells")
nb_execution_in_temp = True
nb_execution_timeout = 400
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them
autodoc_default_options = {
    "members": True,
    "exclude-members": "set_fit_request, set_predict_request, set_predict_proba_request, set_score_request, "
    "set_transform_request, get_metadata_routing",
}
numpydoc_show_class_members = False


def write_startup_file(app):
    """Put `bash_cell.py` where the IPython of the tutorials reads it when it starts."""
    startup = HERE / "_build" / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "bash_cell.py", startup)


def write_command_page(app):
    """Write `commands.md`: what every verb says to `--help`."""
    from brainflow.cli.main import VERBS

    lines = ["# The command line", "", "What `brainflow VERB --help` prints.", ""]
    for verb, (_, what) in VERBS.items():
        lines += [f"## {verb}", "", f"{what[0].upper()}{what[1:]}.", ""]
        forms = ("tar", "arrays", "store", "xcpd", "fbert") if verb == "ingest" else ()
        for form in ([], *([kind] for kind in forms)):
            command = [sys.executable, "-m", "brainflow", verb, *form, "--help"]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            lines += ["```text", shown.rstrip(), "```", ""]
    text = "\n".join(lines)
    page = HERE / "commands.md"
    if not page.exists() or page.read_text() != text:  # an unchanged page is not read again
        page.write_text(text)


def setup(app):
    """Write what is generated before the pages are read."""
    app.connect("builder-inited", write_startup_file)
    app.connect("builder-inited", write_command_page)
