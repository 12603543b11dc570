"""The command line: one function a verb; heavy imports only inside the verb that needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..recipes.errors import ShoestringError, UserError
from .quiet import quiet_libraries

app = typer.Typer(
    name="shoestring",
    help="The best fine-tune of a large language model that your budget can buy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a preset.", metavar="RECIPE")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that beat the recipe's.", metavar="[KEY=VALUE]...")
]
RunArgument = Annotated[Path, typer.Argument(help="A run directory, such as runs/cpu-demo.", metavar="RUN")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"shoestring {__version__}")
        raise typer.Exit


def _look_first(recipe: str, overrides: Sequence[str] | None) -> None:
    """Refuse what is wrong at first sight, before the libraries are imported: that takes seconds.

    Raises UserError for a recipe that is not there or not sound, and for SHOESTRING_OPS.
    """
    from ..recipes import load_recipe

    load_recipe(recipe, overrides or [])
    _check_ops()


def _check_ops() -> None:
    if os.environ.get("SHOESTRING_OPS"):  # only then: it takes torch to know what is allowed
        from ..ops.providers import check_asked

        check_asked()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options of all verbs."""


@app.command(
    epilog="Examples:   shoestring new     ·     shoestring new cpu-demo > my.yaml     ·     "
    "shoestring new gpu-24gb-lora -o my.yaml"
)
def new(
    preset: Annotated[str | None, typer.Argument(help="The preset to copy; none lists them.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here, not to the screen.")
    ] = None,
) -> None:
    """Copy a commented recipe to start from; without a name, list them with the hardware they need."""
    from ..recipes import copy_preset, list_presets

    if preset is None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table("preset", "hardware", "what it does", box=box.SIMPLE_HEAD)
        for entry in list_presets():
            table.add_row(entry.name, entry.hardware, entry.purpose)
        Console().print(table)
        return
    if output is None:
        found = {entry.name: entry.path for entry in list_presets()}
        if preset in found:
            sys.stdout.write(found[preset].read_text(encoding="utf-8"))
            return
    written = copy_preset(preset, output)  # or the error that names the presets
    typer.echo(f"wrote {written}.  Next: shoestring plan {written}")


@app.command(epilog="Example:   shoestring check my.yaml data.max_length=1024")
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check schema, files, tokenizer and masks, and show coloured samples; no weights are loaded."""
    _look_first(recipe, overrides)
    from .inspect import check_recipe

    check_recipe(recipe, overrides or [])


@app.command(epilog="Example:   shoestring plan my.yaml budget=2h --json")
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Memory by part, time and cost, before anything is spent; exit code 3 if it does not fit."""
    _look_first(recipe, overrides)
    from .inspect import show_plan

    show_plan(recipe, overrides or [], as_json=json)


@app.command(
    epilog="Examples:   shoestring prune my.yaml     ·     shoestring prune my.yaml pruning.name=flap "
    "pruning.ratio=0.3"
)
def prune(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Prune anew what was pruned before.")] = False,
) -> None:
    """Prune the model as training would first; show what is smaller, faster and lost."""
    _look_first(recipe, overrides)
    from .prune_verb import prune_recipe

    prune_recipe(recipe, overrides or [], fresh=fresh)


@app.command(
    epilog="Examples:   shoestring train my.yaml     ·     shoestring train cpu-demo budget=6min --fresh     "
    "·     shoestring train my.yaml --num-processes 2"
)
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, deleting what the run directory holds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after the plan, as `shoestring plan`.")
    ] = False,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine (GPUs, or CPU groups).")
    ] = 1,
    pause_at: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Measure, save and leave at this share of the budget; the same command goes on.",
        ),
    ] = None,
) -> None:
    """Plan, train, evaluate, save and export inside the budget; the same command resumes a stopped run."""
    from .launch import launch, process_start

    started = process_start()
    _look_first(recipe, overrides)
    if dry_run:
        from .inspect import show_plan

        show_plan(recipe, overrides or [], as_json=False)
        return
    if num_processes > 1:
        arguments = [recipe, *(overrides or []), *(["--fresh"] if fresh else [])]
        arguments += [] if pause_at is None else ["--pause-at", str(pause_at)]
        raise typer.Exit(launch(arguments, num_processes))
    from .run import train_recipe

    code = train_recipe(recipe, overrides or [], fresh=fresh, started=started, pause_at=pause_at)
    raise typer.Exit(code)


@app.command(
    epilog="Examples:   shoestring extend runs/cpu-demo --budget 3min     ·     "
    "shoestring extend runs/cpu-demo --budget tokens=200k"
)
def extend(
    run: RunArgument,
    budget: Annotated[
        list[str], typer.Option(help="How much more: 1h, tokens=2M, cost='5 USD' (repeat for several).")
    ],
    rewarm: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Peak of the new leg, as a share of the first (default 0.5)."),
    ] = None,
) -> None:
    """Go on with a finished run: from before its decay (wsd), from its end (wsd_s), or warmed up again."""
    from .extend import extend_run
    from .launch import process_start

    raise typer.Exit(extend_run(run, budget, rewarm=rewarm, started=process_start()))


@app.command(
    epilog="Example:   shoestring sweep my.yaml --over optimizer.learning_rate=1e-4,3e-4,1e-3 --over "
    "adapter.r=8,32 --budget 30min"
)
def sweep(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option(help="KEY=A,B,C or KEY=log:1e-5..1e-3:5; repeat it for a grid.", metavar="KEY=VALUES"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Of the whole sweep: 30min, tokens=2M or steps=600 (default: the recipe's)."),
    ] = None,
    reduction: Annotated[int, typer.Option(min=2, help="One in so many goes on at each pause.")] = 3,
    rungs: Annotated[str, typer.Option(help="How many pauses: auto, or a number.")] = "auto",
    by: Annotated[
        str, typer.Option(help="held_out_loss, or early_signals (gradient norms).")
    ] = "held_out_loss",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show trials, rungs and costs only.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, deleting the sweep that is there.")
    ] = False,
) -> None:
    """Try several values inside one budget: stop the worse ones early, take the best to its end."""
    from .launch import process_start

    started = process_start()
    _check_ops()
    from .sweep import read_rungs, sweep_recipe

    code = sweep_recipe(
        recipe,
        overrides or [],
        over=over or [],
        budget=budget,
        reduction=reduction,
        rungs=read_rungs(rungs),
        by=by,
        dry_run=dry_run,
        fresh=fresh,
        started=started,
    )
    raise typer.Exit(code)


@app.command(
    epilog="Examples:   shoestring budget runs/cpu-demo     ·     shoestring budget runs/cpu-demo 40min     "
    "·     shoestring budget runs/cpu-demo 'price=1.10 USD/h'"
)
def budget(
    run: RunArgument,
    new: Annotated[
        list[str] | None, typer.Argument(help="40min, or NAME=AMOUNT as in a recipe.", metavar="[NEW]...")
    ] = None,
) -> None:
    """What a run was given, has used and has left; or give it another budget while it goes."""
    from .budget_verb import show_budget

    show_budget(run, new or [])


@app.command(name="eval", epilog="Example:   shoestring eval runs/cpu-demo --data more.jsonl")
def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option(help="Other data than the run's own held-out rows.")] = None,
) -> None:
    """Held-out loss of a run's exported model."""
    from .inspect import evaluate_run

    evaluate_run(run, data)


@app.command(epilog="Example:   shoestring chat runs/cpu-demo")
def chat(
    run: RunArgument,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Talk to the exported model, through the template it was trained with."""
    from .chat import chat_with

    chat_with(run, max_new_tokens=max_new_tokens)


@app.command(epilog="Example:   shoestring export runs/cpu-demo --to adapter")
def export(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="merged, adapter or gguf.")] = "merged",
    checkpoint: Annotated[str, typer.Option(help="best, last, or a checkpoint's name.")] = "last",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: RUN/export-TO.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="For gguf: f32, f16 (default), bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.")
    ] = None,
) -> None:
    """Export a checkpoint of a run; to gguf also any folder of a model."""
    from .reexport import export_run

    export_run(run, to=to, checkpoint=checkpoint, output=output, quantize=quantize)


@app.command(epilog="Example:   shoestring report runs/a runs/b --output compare.html")
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories; several are compared.", metavar="RUN...")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: RUN/report.html.")] = None,
) -> None:
    """Write the report of one run, or of several side by side, as one offline HTML file."""
    from .report import write_report

    for run in runs:
        if not (run / "resolved.yaml").is_file():
            raise UserError(
                f"{run} is no run directory: it has no resolved.yaml.  Runs lie under runs/ by default."
            )
    if output is None:
        output = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    write_report(runs, output)
    typer.echo(f"wrote {output}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors and other tools."""
    import json

    from ..recipes import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def doctor() -> None:
    """What this machine has, how quick it is, and which optional parts are missing."""
    from .doctor import examine

    examine()


def main() -> None:
    """Exit codes: 0 done, 1 our fault, 2 a user's mistake, 3 does not fit, 4 diverged, 130, 143 saved."""
    quiet_libraries()  # before the libraries are imported: some speak while they are
    try:
        app()
    except ShoestringError as error:
        from rich.console import Console

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(str(error), markup=False, style="red" if console.is_terminal else "")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
