"""Count the lines of the package and of the tests, by folder: `python benchmarks/lines.py`.

A line counts as code if a token of Python other than a comment stands on it; docstrings are counted apart, and so are
blank lines and comments. Templates, scripts and styles (everything that is no Python) stand in the last column.
"""

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
COLUMNS = ("files", "lines", "code", "docstrings", "other", "not Python")


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the numbers of the lines of all docstrings, those of attributes included."""
    numbers = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for part in node.body:
                value = part.value if isinstance(part, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    numbers.update(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return numbers


def count(path: Path) -> Counter[str]:
    """Return the numbers of lines of a file by kind."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return Counter({"not Python": len(text.splitlines())})
    docstrings = docstring_lines(ast.parse(text))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    used = {n for token in tokens if token.type not in NO_CODE for n in range(token.start[0], token.end[0] + 1)}
    code, lines = len(used - docstrings), len(text.splitlines())
    kinds = {"docstrings": len(docstrings), "code": code, "other": lines - code - len(docstrings)}
    return Counter({"files": 1, "lines": lines, **kinds})


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    print("".ljust(24), *(column.rjust(10) for column in COLUMNS))
    for top in ("lumiere", "tests"):
        totals: dict[str, Counter[str]] = {}
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in {".py", ".js", ".css", ".html", ".j2", ".txt"} and "fixtures" not in path.parts:
                folder = path.relative_to(ROOT / top).parts[0] if path.parent != ROOT / top else "."
                totals.setdefault(folder, Counter()).update(count(path))
        totals["all"] = sum(totals.values(), Counter())
        for folder, numbers in totals.items():
            print(f"{top}/{folder}".ljust(24), *(f"{numbers[column]:,}".rjust(10) for column in COLUMNS))


if __name__ == "__main__":
    main()
