"""``python -m tests.bench [COMMAND ...]``: runs one benchmark, which is a module of this folder; alone, lists them.

``python -m tests.bench COMMAND --help`` says what a command measures and takes.
"""

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def commands() -> dict[str, str]:
    """Each module that can be run, and the sentence that says what it measures; nothing is imported for it."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text())
        runs = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
        if runs and path.name != "__main__.py":
            sentence = (ast.get_docstring(tree) or "").split("\n")[0]
            found[path.stem] = sentence.split("``: ", 1)[-1]
    return found


def main() -> None:
    """Hand the rest of the command line to the module that was named."""
    known = commands()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        width = max(map(len, known))
        print(__doc__)
        print("\n".join(f"  {name:{width}}  {sentence}" for name, sentence in known.items()))
        return
    name = sys.argv.pop(1)
    if name not in known:
        sys.exit(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    runpy.run_module(f"tests.bench.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
