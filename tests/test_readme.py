"""Every Python block of the documentation runs, in order, in one namespace a file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"))
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_code_blocks_run(page):
    namespace = {}
    text = (ROOT / page).read_text()
    # What a block takes for granted stands before it in a comment.
    for block in re.findall(r"(?:```python|<!-- setup)\n(.*?)(?:```|-->)", text, re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        target = target[0] or target[1]
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_readme_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for target in re.findall(r"^make (\w+)", commands, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
