"""Say what is wrong with an sdist and a wheel: files that are missing, or that should not be there."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

BOTH = {"ralu/py.typed", "ralu_kernels/py.typed", "ralu/cli/info.py", "ralu/mini/weights/mini-flux/model_index.json"}
SDIST = {"setup.py", "csrc/binding.cpp", "csrc/ops.h", "tests/conftest.py", "docs/index.md", "constraints.txt",
         "Makefile", "LICENSE", "NOTICE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"}  # fmt: skip
STRAY = re.compile(r"\.(py[cod]|so|o)$|__pycache__|\.egg-info/(?!PKG-INFO|\w+\.txt)|(^|/)(build|dist|outputs|\.venv)/")
INSIDE = re.compile(r"ralu(_kernels)?/|ralu-[^/]+\.dist-info/")


def names(path: Path) -> set[str]:
    """List the files of an sdist without its folder, or of a wheel."""
    if path.suffix == ".whl":
        return set(zipfile.ZipFile(path).namelist())
    return {name.partition("/")[2] for name in tarfile.open(path).getnames()}


for path in map(Path, sys.argv[1:]):
    found, is_wheel = names(path), path.suffix == ".whl"
    compiled = {name for name in found if is_wheel and name == "ralu_kernels/ralu_kernels_C.abi3.so"}
    odd = {name for name in found - compiled if STRAY.search(name) or (is_wheel and not INSIDE.match(name))}
    faults = [f"{name} is missing" for name in sorted((BOTH if is_wheel else BOTH | SDIST) - found)]
    faults += [f"{name} does not belong there" for name in sorted(odd)]
    if is_wheel and path.name.endswith("none-any.whl") == bool(compiled):
        faults.append(f"its tag says otherwise than the {len(compiled)} extensions inside")
    if faults:
        sys.exit("\n".join([f"{path}:", *faults]))
    print(f"{path}: {len(found)} files, {'with' if compiled else 'without'} an extension")
