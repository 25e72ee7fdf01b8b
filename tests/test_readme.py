"""The Python examples of the README and the docs run as they stand, each in a fresh namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]
EXAMPLES = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)]


@pytest.mark.parametrize("source", EXAMPLES, ids=[source.strip().splitlines()[0][:40] for source in EXAMPLES])
def test_example_runs(source, capsys):
    namespace: dict = {}
    exec(compile(source, str(README), "exec"), namespace)
    capsys.readouterr()


def test_first_example_is_short_and_closes_the_hole():
    lines = [line for line in EXAMPLES[0].splitlines() if line.strip()]
    assert len(lines) <= 20
    namespace: dict = {}
    exec(EXAMPLES[0], namespace)
    radius = namespace["z"].norm(dim=1)
    assert ((radius > 1.5) & (radius < 2.5)).float().mean() > 0.95
