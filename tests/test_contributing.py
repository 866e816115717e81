"""What CONTRIBUTING shows works as it stands there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from demerge.merging.registry import find_method
from demerge.testing import check_method


def test_the_method_of_the_guide_passes_every_property(tmp_path: Path) -> None:
    guide = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    file = tmp_path / "median.py"
    file.write_text(
        textwrap.dedent(code).replace('@method("median"', '@method("median of the guide"'),
        encoding="utf-8",
    )
    method = find_method(f"{file}:median")
    assert list(method.options) == ["scale"]
    check_method(method.function)
