"""The command line: python -m tinylora_kernels [info | ...]. Each command lives in a module imported when asked for."""
from __future__ import annotations

import contextlib
import importlib
import os
import sys

# command -> (module with main(argv) -> exit status, one line of help)
COMMANDS = {
    "info": ("tinylora_kernels.diagnostics", "what is installed, which backends run here, and why others do not"),
    "compile": ("tinylora_kernels.linear.build", "the C++ autograd node of linear layers, for this torch and Python"),
    "inspect": ("tinylora_kernels.files.inspect", "what an adapter file holds"),
    "export": ("tinylora_kernels.files.export", "an adapter file as a standard LoRA directory"),
}
DEFAULT = "info"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What the system refuses, a full disk or a name that may not be read, is
    one line; a reader that has seen enough (`| head`) ends it in silence.
    """
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):  # names of modules in a locale that cannot spell them
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"{' '.join(argv[:1]) or DEFAULT}: {error}", file=sys.stderr)
        # Python would try to write the rest as it ends, and say that it could not.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, arguments = (argv[0], argv[1:]) if argv else (DEFAULT, [])
    if name not in COMMANDS:
        print(f"command: expected one of {', '.join(COMMANDS)}, found {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    return importlib.import_module(module).main(arguments) or 0


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: python -m tinylora_kernels [command] [options]", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
