"""The documents' Python examples run, page by page, in order, sharing names as a reader's session would.

A block marked ``python`` is executed; one marked ``pycon`` is a session whose output is compared.
"""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [page for page in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))] if "```py" in page.read_text()]
FENCE = re.compile(r"^( *)```(python|pycon)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), {"__name__": "__main__"}
    blocks = list(FENCE.finditer(text))
    assert len(blocks) == len(re.findall(r"```py", text)), "a block that is neither python nor pycon, or isn't closed"
    for block in blocks:
        indent, kind, source = block.groups()
        source = re.sub(f"^{indent}", "", source, flags=re.MULTILINE)
        line = text.count("\n", 0, block.start(3))
        if kind == "python":
            # Blank lines before the source give tracebacks the page's line numbers.
            exec(compile("\n" * line + source, page, "exec"), names)
        else:
            session = doctest.DocTestParser().get_doctest(source, names, page.name, str(page), line)
            report: list[str] = []
            runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
            assert not runner.run(session, out=report.append, clear_globs=False).failed, "".join(report)
            names = session.globs
