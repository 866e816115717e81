"""The README's Python: each block runs as it is written, at a small size."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
SCORES = {"num_images": 70, "steps": 2, "seeds": (0,), "loss_samples": 16, "lpips": False}
SMALL: dict[str, dict[str, Any]] = {
    "MeasurementOptions": {"bins": 4, "groups": 6, "batch_size": 96},
    "FinetuneOptions": {"max_train_steps": 1, "train_batch_size": 2},
    "EvaluationOptions": SCORES,
    "evaluate": SCORES,
}


class Shrink(ast.NodeTransformer):
    """Give the calls of `SMALL` small sizes in place of those in the text."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        changes = SMALL.get(ast.unparse(node.func).rpartition(".")[2], {})
        if any(ast.unparse(value).startswith("EvaluationOptions") for value in node.args):
            return node
        keep = [keyword for keyword in node.keywords if keyword.arg not in changes]
        small = [ast.keyword(name, ast.Constant(value)) for name, value in changes.items()]
        node.keywords = [*keep, *small]
        return node


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_the_readme_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = ast.fix_missing_locations(Shrink().visit(ast.parse(block)))
    exec(compile(tree, str(README), "exec"), {"__name__": "readme"})


def test_the_readme_shows_the_library() -> None:
    assert BLOCKS and "from demerge import" in BLOCKS[0]
