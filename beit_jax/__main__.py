"""Lists the commands: python -m beit_jax"""

import ast
import pathlib


def main() -> None:
    """Prints each command with the first line of its documentation, and how to get more."""
    folder, is_command = pathlib.Path(__file__).parent, 'if __name__ == "__main__":'
    for path in sorted([*folder.glob("[!_]*.py"), *folder.glob("*/__main__.py")]):
        text = path.read_text(encoding="utf-8")
        if is_command in text:
            name = path.stem if path.parent == folder else path.parent.name
            line = ast.get_docstring(ast.parse(text)).splitlines()[0].partition(": python")[0]
            line = line.removesuffix(".")
            print(f"python -m beit_jax.{name:15} {line}")
    print("Each takes --help. To train: python main.py --config=... --workdir=..., see README.md.")


if __name__ == "__main__":
    main()
