"""`tpc`: the command line. Exit code 0: done; 1: a check failed; 2: bad input, in one line; 70: a bug;
130: interrupted.

Command modules import torch inside their functions, so that help and the schema come at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from tpcompiler.cli import calibrate, html_report, merge, plan, plan_export, start
from tpcompiler.cli import compile as compiling
from tpcompiler.cli import eval as measuring
from tpcompiler.cli import generate as generating
from tpcompiler.cli import tokenize as tokenizing
from tpcompiler.cli import train as training
from tpcompiler.cli.screen import complain
from tpcompiler.errors import CheckError, RankEnded, TpcError

app = typer.Typer(
    name="tpc",
    help="A plain PyTorch transformer and a short YAML spec in, a tensor-parallel program out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Each command with examples for the end of its help.
COMMANDS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "shard": (
        compiling.shard,
        (
            "tpc shard models/gpt2.py --spec specs/8way.yaml",
            "tpc shard hf:checkpoints/llama --spec specs/8way.yaml -o out/llama",
        ),
    ),
    "diff": (compiling.diff, ("tpc diff models/gpt2.py --spec specs/2way.yaml --set layers=2",)),
    "verify": (
        compiling.verify,
        (
            "tpc verify models/gpt2.py --spec specs/2way.yaml",
            "tpc verify models/gpt2.py --spec specs/2way.yaml --set layers=2 --distributed",
        ),
    ),
    "explain": (compiling.explain, ("tpc explain models/gpt2.py --spec specs/2way.yaml 'h.*.mlp'",)),
    "report": (
        html_report.report,
        ("tpc report models/gpt2.py --spec specs/8way.yaml -o report.html",),
    ),
    "export": (
        plan_export.export,
        (
            "tpc export hf:checkpoints/llama --spec specs/2way.yaml --format hf-tp-plan -o tp_plan.json",
            "tpc export hf:checkpoints/llama --spec specs/2way.yaml --format dtensor -o tensor_parallel.py",
        ),
    ),
    "plan": (
        plan.plan,
        (
            "tpc plan models/gpt2.py --gpus 8 --hardware h200 --set hidden=3072 --set layers=72 -o 8.yaml",
            "tpc plan hf:checkpoints/llama --gpus 64 --batch 256 --sequence 4096 --memory 80GiB",
        ),
    ),
    "calibrate": (
        calibrate.calibrate,
        (
            "tpc calibrate -o machine.yaml",
            "torchrun --nproc-per-node 8 --no-python tpc calibrate --base h200 -o machine.yaml",
        ),
    ),
    "init": (start.init, ("tpc init models/gpt2.py --tensor 4 --set layers=12 -o first.yaml",)),
    "doctor": (start.doctor, ("tpc doctor", "tpc doctor --json")),
    "merge": (
        merge.merge,
        (
            "tpc merge out/gpt2 -o gpt2.safetensors",
            "tpc merge runs/gpt2/checkpoints/step-00001000 -o merged",
        ),
    ),
    "schema": (merge.schema, ("tpc schema > spec.schema.json",)),
    "train": (
        training.train,
        (
            "tpc train models/gpt2.py --spec specs/demo.yaml -o runs/demo",
            "tpc train models/gpt2.py --spec specs/2way.yaml --data 'corpus/*.jsonl' -t optimizer.lr=1e-3 -o runs/gpt2",
        ),
    ),
    "tokenize": (
        tokenizing.tokenize,
        ("tpc tokenize 'corpus/*.jsonl' --tokenizer gpt2/tokenizer.json",),
    ),
    "eval": (
        measuring.evaluate,
        ("tpc eval models/gpt2.py --spec specs/demo.yaml --weights runs/demo --perplexity test.txt",),
    ),
    "generate": (
        generating.generate,
        (
            "tpc generate models/gpt2.py --spec specs/demo.yaml --weights runs/demo --prompt 'The license'",
            "tpc generate models/gpt2.py --spec specs/demo.yaml --weights runs/demo --prompts p.jsonl -o texts.jsonl",
        ),
    ),
    "plot": (measuring.plot, ("tpc plot runs/small runs/large --label small --label large -o loss.png",)),
    "reshard": (training.reshard, ("tpc reshard out/gpt2 --spec specs/4way.yaml -o out/gpt2-4way",)),
}
for _name, (_command, _examples) in COMMANDS.items():
    _epilog = "\b\n" + "\n".join(["Examples:" if len(_examples) > 1 else "Example:", *(f"  {e}" for e in _examples)])
    app.command(_name, epilog=_epilog)(_command)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    if version:
        from tpcompiler.version import __version__

        typer.echo(f"tpc {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. A mistake of the user is reported in one line, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    command = typer.main.get_command(app)
    try:
        with _terminable():
            code = command.main(args=arguments, prog_name="tpc", standalone_mode=False)
            sys.stdout.flush()
    except TpcError as e:
        complain(str(e), as_json)
        return 1 if isinstance(e, CheckError) else 2
    except RankEnded as e:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(e.code if isinstance(e.code, int) else 2)  # a group of ranks that has failed may wait for ever at exit
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `tpc schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # a full disk under stdout, a directory that is gone
        complain(f"{e.filename or 'output'}: {(e.strerror or str(e)).lower()}", as_json)
        return 2
    except Exception as e:
        return _usage(e, as_json) if hasattr(e, "format_message") else _bug(e, as_json)
    return code if isinstance(code, int) else 0


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that half-written directories are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _usage(error: Any, as_json: bool) -> int:
    """Typer's own errors: unknown options, missing arguments."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message())
        return 2
    context = getattr(error, "ctx", None)
    where = f"; see `{context.command_path} --help`" if context is not None else ""
    complain(error.format_message().rstrip(".") + where, as_json)
    return 2


def _bug(error: Exception, as_json: bool) -> int:
    """Reports a bug of tpcompiler in one line, with the place in the code."""
    if os.environ.get("TPC_TRACEBACK"):
        raise error
    if type(error).__name__ == "Abort":
        return 130
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    complain(f"a bug of tpcompiler: {what} (at {place}); please report it with the output of TPC_TRACEBACK=1", as_json)
    return 70


if __name__ == "__main__":
    sys.exit(main())
