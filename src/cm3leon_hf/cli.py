"""The command line: `cm3leon generate`, `describe`, `edit`, `serve`; `plan`, `compare`, `convert`, `export` help."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .cli_compare import compare
from .cli_convert import convert
from .cli_describe import describe
from .cli_edit import edit
from .cli_export import export
from .cli_generate import generate
from .cli_plan import plan
from .cli_serve import SETTINGS, serve

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # it warns whenever transformers imports torchao

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="CM3Leon: one model that draws pictures from text, describes them in text, and edits them.",
)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can mend is said in one line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


for command in (generate, describe, edit, plan, compare, convert, export):
    app.command()(errors_in_one_line()(command))
app.command(context_settings=SETTINGS)(errors_in_one_line()(serve))
