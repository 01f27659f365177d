"""The table of docs/models.md: what is served in which pipeline, made of the tests that prove it.

Such a test has the mark `serves(feature, *pipelines)` or `refuses(feature, *pipelines)`; without pipelines it speaks of
the family that it is run with. `python tests/test_served.py` writes the table.
"""

import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tiny

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BLOCK = re.compile(r"(<!-- begin tests/test_served.py -->\n\n).*?(\n\n<!-- end tests/test_served.py -->)", re.DOTALL)
FEATURES = (
    "equals a run written out by hand", "images as conditions", "a batch equals its single runs",
    "token counts of its own for every image", "guidance", "sizes that divide by 16 alone",
    "callbacks, previews, interruption", "LoRA", "IP-adapters", "offloading", "torch.compile", "saving and loading",
    "upsampler=pixels", "fused blocks", "TaylorSeer", "TeaCache", "ToCa", "DeltaDiT", "RAS",
    "estimate equals the counted run", "context parallelism", "disable restores every bit",
)  # fmt: skip


def pipelines(item, mark) -> tuple[str, ...]:
    """Name the pipelines that a mark of a test speaks of."""
    if mark.args[1:]:
        return mark.args[1:]
    given = item.callspec.params
    made = get_type_hints(tiny.FAMILIES[given.get("family", given.get("name"))].make)["return"]
    return ((get_args(made) or (made,))[0].__name__,)


def table(items) -> str:
    """Print the table: "yes" where tests serve a feature and none refuses it, "refused" where one does."""
    found = {}
    for item in items:
        for kind in ("refuses", "serves"):
            for mark in item.iter_markers(kind):
                feature = mark.args[0]
                assert feature in FEATURES, f"{item.nodeid}: {feature!r} is none of test_served.py's features"
                for pipeline in pipelines(item, mark):
                    found[pipeline, feature] = {"refuses": "refused", "serves": "yes"}[kind]
    columns = [feature for feature in FEATURES if any(feature == of for _, of in found)]
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    names = sorted({pipeline for pipeline, _ in found})
    lines += [[f"`{name}`", *(found.get((name, feature), "") for feature in columns)] for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def test_the_table_is_made_of_these_tests(request):
    """Only where the whole suite is collected: what is left out would leave its cells empty."""
    marked = {path.name for path in Path(__file__).parent.glob("test_*.py") if "mark.serves(" in path.read_text()}
    items = request.session.items
    if missing := marked - {item.path.name for item in items}:
        pytest.skip(f"the tests of {', '.join(sorted(missing))} are not collected")
    assert BLOCK.search(PAGE.read_text())[0] == BLOCK.sub(rf"\1{table(items)}\2", BLOCK.search(PAGE.read_text())[0])


class Writer:
    """A plugin that writes the table of the tests that were collected."""

    def pytest_collection_finish(self, session):
        page = PAGE.read_text()
        PAGE.write_text(BLOCK.sub(lambda match: match[1] + table(session.items) + match[2], page))


if __name__ == "__main__":
    sys.exit(pytest.main(["--collect-only", str(Path(__file__).parent)], plugins=[Writer()]))
