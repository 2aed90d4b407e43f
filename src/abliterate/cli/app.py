"""The command line. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done; 1 unexpected failure; 2 wrong option or configuration; 3 unusable prompts or
artifact; 4 unusable model or checkpoint; 5 no direction passes the filters; 6 verify says no;
7 audit says edited; 8 audit cannot tell; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from abliterate.cli import (
    analysis,
    audit_commands,
    chat,
    checks,
    commands,
    diff_command,
    evaluate_commands,
    export_command,
    fragility_command,
    methods_command,
    plan_command,
    report_command,
)
from abliterate.cli import options as opt
from abliterate.cli.commands import open_session
from abliterate.cli.plain_help import PlainCommand, PlainGroup
from abliterate.console import (
    debugging,
    flush_output,
    print_error,
    print_json,
    print_line,
    print_traceback,
    set_up,
    stop_output,
)
from abliterate.distributed import rank_process
from abliterate.errors import AbliterateError, one_line, speaking_of_options
from abliterate.settings import load_settings

#: What typer raises for wrong usage. Its module and name differ between releases (click's own, then
#: a copy of click's, then typer's); it is the most general parent that formats its message.
UsageProblem: type[Any] = next(
    kind for kind in reversed(typer.BadParameter.__mro__) if hasattr(kind, "format_message")
)

app = typer.Typer(
    cls=PlainGroup,
    help="Find, test and remove the refusal direction of a language model "
    "(Arditi et al. 2024, arXiv 2406.11717).",
    epilog="Exit codes: 0 done, 1 unexpected failure, 2 wrong option, 3 unusable prompts or "
    "artifact, 4 unusable model, 5 no direction passes, 6 verify says no, 7 audit says edited, "
    "8 audit cannot tell, 130 interrupted.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors become one line on stderr."""
    set_up(quiet=False, debug=False)
    with speaking_of_options():
        try:
            rank_process.begin()
            code = _run(argv)
            rank_process.settle()
        except AbliterateError as error:  # the launcher stopped this rank while it was ending
            code = _fail(str(error), error.exit_code, error)
        return rank_process.end(code)


def _run(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    try:
        result = _commands()(
            args=opt.spell_out(words),
            prog_name="abliterate",
            standalone_mode=False,
        )
        flush_output()
        if result == 130:  # typer turns Ctrl-C into this value
            return _fail("interrupted", 130)
        return result if isinstance(result, int) else 0
    except AbliterateError as error:
        return _fail(str(error), error.exit_code, error)
    except UsageProblem as error:
        message = error.format_message()
        if "extra argument" in message:
            message = opt.stray_value(words) or message
        return _fail(message, 2, error) if message else 2  # no message: the help was shown
    except typer.Abort:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        stop_output()
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and os.sep in str(error.filename)
        mend = ": make room there, or choose another folder" if full else ""
        return _fail(f"{where}{error.strerror or error}{mend}", 3, error)
    except Exception as error:
        if (known := rank_process.explained(error)) is not None:
            return _fail(str(known), known.exit_code, error)
        short = one_line(error) or "no message"
        if _is_lack_of_memory(error):
            text = f"memory ran out ({short[:200]}): use a smaller --batch-size or --dtype, "
            return _fail(text + "--offload, or another --device", 2, error)
        text = f"unexpected {type(error).__name__}: {short[:300]} (--debug shows the traceback)"
        return _fail(text, 1, error)


@cache
def _commands() -> Any:
    """Typer makes all commands anew each time it is asked; they do not change within a process."""
    return typer.main.get_command(app)


def _is_lack_of_memory(error: Exception) -> bool:
    """Where no batch could be made smaller."""
    if not (isinstance(error, RuntimeError) and "memory" in str(error)):
        return False
    from abliterate.inference.token_batches import out_of_memory

    return out_of_memory(error)


def _fail(message: str, code: int, error: BaseException | None = None) -> int:
    if debugging() and error is not None:
        print_traceback(error)
    print_error(f"{rank_process.name()}{message}")
    return code


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print_line(f"abliterate {version('abliterate')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command(cls=PlainCommand)
@opt.command()
def prompts(
    source: Annotated[
        str, typer.Argument(help="Set name, preset, file or hub dataset.", show_default=False)
    ],
    examples: Annotated[int, typer.Option(help="How many examples to show.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    as_json: opt.Json = False,
) -> None:
    """Show what a prompt source holds: counts, splits, categories and examples."""
    from abliterate.cli.tables import describe_source, show_source

    document = describe_source(source, examples, seed)
    print_json(document) if as_json else show_source(document)


app.command(cls=PlainCommand)(commands.extract)
app.command(cls=PlainCommand)(commands.select)
app.command(cls=PlainCommand)(commands.orthogonalize)
app.command(cls=PlainCommand)(checks.verify)
app.command(cls=PlainCommand)(evaluate_commands.evaluate)
app.command(cls=PlainCommand)(evaluate_commands.score)
app.command(cls=PlainCommand)(commands.run)
app.command(cls=PlainCommand)(checks.writers)
app.command(cls=PlainCommand)(analysis.inspect)
app.command(cls=PlainCommand)(analysis.trace)
app.command(cls=PlainCommand)(report_command.report)
app.command(cls=PlainCommand)(audit_commands.audit)
app.command(cls=PlainCommand)(diff_command.diff)
app.command(cls=PlainCommand)(fragility_command.fragility)
app.command(cls=PlainCommand)(chat.chat)
app.command(cls=PlainCommand)(plan_command.plan)
app.command(cls=PlainCommand)(export_command.export)
app.command(cls=PlainCommand)(methods_command.methods)


@app.command(cls=PlainCommand)
@opt.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder to write.")] = Path(
        "runs/demo"
    ),
    as_json: opt.Json = False,
) -> None:
    """Run the whole pipeline on the bundled model and show what changed."""
    from abliterate.cli.demo_output import show_demo, write_demo_report
    from abliterate.pipeline.run import run_pipeline
    from abliterate.resources import config_dir, demo_model_dir

    settings = load_settings(config_dir() / "demo.toml")
    record = run_pipeline(open_session(str(demo_model_dir()), settings), output)
    report = write_demo_report(output)
    print_json(record) if as_json else show_demo(record, output, report)
