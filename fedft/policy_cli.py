"""Options of ``fedft join`` about its file and about what it takes part in."""

from pathlib import Path
from typing import Annotated

import typer

_FILE = "This client's data"
_POLICY = "This client's policy"

Text = Annotated[str, typer.Option(help="Column with the text.", rich_help_panel=_FILE)]
Label = Annotated[str, typer.Option(help="Column with the class.", rich_help_panel=_FILE)]
Prompt = Annotated[str, typer.Option(help="Column with the prompt.", rich_help_panel=_FILE)]
Answer = Annotated[str, typer.Option(help="Column with the answer.", rich_help_panel=_FILE)]
Image = Annotated[str, typer.Option(help="Column with the image.", rich_help_panel=_FILE)]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="Name of a column of another task, by what the task calls it.",
        metavar="KEY=NAME",
        rich_help_panel=_FILE,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        help="Form of the rows for causal-lm, such as messages; auto goes by the columns.",
        rich_help_panel=_FILE,
    ),
]
MapLabel = Annotated[
    list[str] | None,
    typer.Option(
        help="What a label of the file is called in the run.",
        metavar="OLD=NEW",
        rich_help_panel=_FILE,
    ),
]
MaxRows = Annotated[
    int | None, typer.Option(help="Rows to bring, the first ones.", rich_help_panel=_FILE)
]
SkipBad = Annotated[bool, typer.Option(help="Leave malformed rows out.", rich_help_panel=_FILE)]
Check = Annotated[
    bool,
    typer.Option(
        "--check", help="Show what would be trained, and join nothing.", rich_help_panel=_FILE
    ),
]
SendDetails = Annotated[
    bool,
    typer.Option(
        "--send-details",
        help="Send the text of errors to the server, too; it can quote the data.",
        rich_help_panel=_FILE,
    ),
]

PolicyFile = Annotated[
    Path | None,
    typer.Option("--policy", help="TOML file with these and more.", rich_help_panel=_POLICY),
]
LeastNoise = Annotated[
    float | None,
    typer.Option(help="Least noise multiplier of DP-SGD.", rich_help_panel=_POLICY),
]
MostEpsilon = Annotated[
    float | None,
    typer.Option(help="Largest ε of all results on these data.", rich_help_panel=_POLICY),
]
Delta = Annotated[float | None, typer.Option(help="δ of this ε.", rich_help_panel=_POLICY)]
MostRounds = Annotated[int | None, typer.Option(help="Rounds of a run.", rich_help_panel=_POLICY)]
MostEpochs = Annotated[int | None, typer.Option(help="Epochs of a round.", rich_help_panel=_POLICY)]
MostSteps = Annotated[int | None, typer.Option(help="Steps of a round.", rich_help_panel=_POLICY)]
MostSeconds = Annotated[
    float | None, typer.Option(help="Seconds of a round.", rich_help_panel=_POLICY)
]
MostBatchSize = Annotated[
    int | None, typer.Option(help="Examples of a step.", rich_help_panel=_POLICY)
]
LeastClients = Annotated[
    int | None,
    typer.Option(
        help="Clients without whom no round counts, as the server says.", rich_help_panel=_POLICY
    ),
]
ModelHash = Annotated[
    list[str] | None,
    typer.Option(
        "--model-sha256",
        help="SHA-256 of weights that may be loaded; any number of times.",
        rich_help_panel=_POLICY,
    ),
]
Task = Annotated[
    list[str] | None,
    typer.Option("--task", help="What may be trained; any number.", rich_help_panel=_POLICY),
]
Trainer = Annotated[
    list[str] | None,
    typer.Option(
        "--trainer",
        help="Trainer of one's own that a run may have: code here; any number.",
        metavar="MODULE:FUNCTION",
        rich_help_panel=_POLICY,
    ),
]
Metrics = Annotated[
    bool | None,
    typer.Option(
        "--metrics/--no-metrics",
        help="Whether losses and scores leave.",
        rich_help_panel=_POLICY,
    ),
]
