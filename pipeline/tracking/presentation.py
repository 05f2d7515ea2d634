"""What MLflow's pages show of our runs before anybody clicks: descriptions, columns and the first charts.

All of it is a tag or a metric's name. MLflow has no setting for the columns of its own run list, nor for the order of
charts: it has views, which a link or its menu opens, and it sorts charts by the names of the metrics.
"""

import json
from typing import TYPE_CHECKING

from pipeline.paths import RUN_FILES
from pipeline.runs.provenance import digest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NOTE, NOTE_DIGEST = "mlflow.note.content", "note_digest"
TRAINING = "workflowType=machine_learning"  # in an address: the pages for training, not those for traces and prompts
VIEW = "reinforce"  # the view's id, in addresses
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = {  # in this order; widths in pixels: a gain fits with its interval, and a screen shows all columns
    "attributes.`Run Name`": 280,
    "params.`reward`": 100,
    "params.`recipe`": 90,
    "params.`seed`": 60,
    "tags.`verdict`": 110,
    "tags.`heldout_gain`": 235,
}
FIRST_CHARTS = "curves"  # sorts before evaluate/, time/ and train/; the two metrics below are in train/ too
FIRST_METRICS = ("reward_mean", "entropy")
# The list of experiments shows the first words, an experiment's page the first paragraph, even if it opens on traces.
DESCRIPTION = """Trainings of language models with REINFORCE: [the runs, with verdict and held-out gain]({page})

- The link opens the view *Verdict and gain*, which is in the menu *Views* too; *Override saved view* keeps its columns.
- A run's charts begin with entropy and reward over the steps. Its description has the verdict and links to its report.
- `reinforce compare` puts configurations side by side, mean and standard deviation over seeds.
- A run that says *Running* although its process is gone is ended by `reinforce track`, on the machine that it ran on.
"""


def runs_page(experiment: str) -> str:
    """Address of the run list with our columns, without the server."""
    return f"#/experiments/{experiment}/runs?{TRAINING}&viewStateShareKey={VIEW}"


def experiment_tags(experiment: str) -> dict[str, str]:
    # The format in which MLflow 3.17 saves a view; a version that does not know it shows its own columns.
    state = {"selectedColumns": [*COLUMNS], "columnOrder": [*COLUMNS], "columnWidths": COLUMNS}
    view = {"name": "Verdict and gain", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    return {
        # the same as TRAINING, for versions of MLflow 3 whose pages cannot switch between training and traces
        "mlflow.experimentKind": "custom_model_development",
        NOTE: DESCRIPTION.format(page=runs_page(experiment)),
        VIEW_TAG: json.dumps(view),
    }


def complete_experiment(client: "MlflowClient", experiment: str) -> None:
    """Set the tags that the experiment lacks. Existing tags stay, since users edit descriptions."""
    present = client.get_experiment(experiment).tags
    for key, value in experiment_tags(experiment).items():
        if key not in present:
            client.set_experiment_tag(experiment, key, value)


def describe_run(client: "MlflowClient", run: "Run", headline: str, tags: dict[str, str]) -> None:
    """Write the run's description, unless somebody has edited it.

    headline: the verdict in words. tags: the run's new tags. The page folds a description of more than five lines.
    """
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/{RUN_FILES.page.name}?{TRAINING}"
    gain = f"Held-out gain over the reference model: {tags.get('heldout_gain', 'undefined')}"
    note = f"**{tags['verdict']}.** {headline}\n\n{gain}. [Report]({page})"
    before = run.data.tags.get(NOTE)
    # The digest comes second: after a kill between the two calls, the note equals the one to write.
    if before is None or before == note or digest(before) == run.data.tags.get(NOTE_DIGEST):
        client.set_tag(run.info.run_id, NOTE, note)
        client.set_tag(run.info.run_id, NOTE_DIGEST, digest(note))
