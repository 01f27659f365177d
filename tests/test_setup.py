"""What installers see of setup.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def setup(*arguments, **environment):
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    environment = os.environ | {"RALU_NATIVE": "0"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_links_of_the_package_index_are_absolute():
    done = setup("--long-description")
    text = done.stdout[done.stdout.index("# RALU") :]
    url = re.search(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"repo_url: {url}\n" in (ROOT / "mkdocs.yml").read_text()
    there, here = (re.findall(r"\]\(([^)\s]+)\)", page) for page in (text, (ROOT / "README.md").read_text()))
    assert len(there) == len(here) > 20
    for absolute, link in zip(there, here, strict=True):
        kind = "raw" if link.endswith(".png") else "blob"
        assert absolute == (link if link.startswith("https://") else f"{url}/{kind}/main/{link}")


def test_old_setuptools_is_refused_in_words(tmp_path):
    """It would stop at the licence in pyproject.toml, of which it knows another form."""
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'")
    done = setup(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "setuptools 65.5.0 is too old" in done.stderr and 'pip install "setuptools>=77"' in done.stderr


def test_a_switch_is_0_or_1():
    done = setup("--version", RALU_NATIVE="yes")
    assert done.returncode == 1 and done.stderr == "RALU_NATIVE must be 0 or 1, got 'yes'\n"
