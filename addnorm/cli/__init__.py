"""The command line: parse, call, print. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from addnorm import __version__

COMMANDS = {
    "compare": "Train the same network under several wirings and depths, X-ray each, report.",
    "train": "Train one model on text or images; resumes after any interruption.",
    "sample": "Generate text from a run.",
    "xray": "X-ray a run, a Hugging Face folder, or pkg.module:function returning a model.",
    "study": "Run the studies: claims about residual connections as experiments with a verdict.",
    "wirings": "Show the catalogue: equation, start, paper.",
    "report": "(Re)build the HTML page from saved results.",
    "data": "List the corpora and image sets, describe texts or images, or build a corpus.",
}
NETWORKS = ("compare", "train")  # whose options depend on the network


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0 fine, 1 a sick verdict of `xray` or a refuted one of `study`, 2 bad input, 70 internal error,
    130 interrupted.
    """
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"addnorm: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("addnorm: interrupted", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001  # the last resort: say that the defect is ours
        traceback.print_exc()
        print("addnorm: this is a defect of addnorm, not of your input", file=sys.stderr)
        return 70


def _dispatch(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name in ("-V", "--version"):
        print(f"addnorm {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown command {name!r}{hint} (known: {', '.join(COMMANDS)})")
    from addnorm.cli.parsing import parse, plugins_of
    from addnorm.plugins import load_plugins

    command = importlib.import_module(f"addnorm.cli.{name}")
    rest = argv[1:]
    load_plugins(plugins_of(rest))  # before the options are read, which may name their wirings
    try:
        if name in NETWORKS:
            kind, default = command.defaults(rest)
            return int(command.run(parse(kind, name, COMMANDS[name], rest, default)))
        return int(command.run(parse(command.Options, name, COMMANDS[name], rest)))
    except SystemExit:  # --help of the command
        return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "addnorm: build, train and X-ray the residual stream of deep networks",
            "",
            "usage: addnorm COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "addnorm COMMAND --help lists the options of a command; --version prints the version.",
            "Exit codes: 0 fine, 1 the X-ray found something sick or a study refuted what the docs",
            "rely on, 2 bad input, 70 internal error, 130 interrupted.",
        ]
    )


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot read or write{where}: {error.strerror.lower()}"
    return " ".join(str(error).split())
