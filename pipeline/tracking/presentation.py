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
VIEW = "reinforce"  # its id, in addresses
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = {  # width in pixels; where they are sorted after others, a laptop's screen cuts them off
    "params.`reward`": 110,
    "params.`recipe`": 110,
    "params.`seed`": 70,
    "tags.`verdict`": 130,
    "tags.`heldout_gain`": 270,
}
FIRST_CHARTS = "curves"  # sorted before evaluate/, time/ and train/, where these two stand as well
FIRST_METRICS = ("reward_mean", "entropy")
DESCRIPTION = """Trainings of language models with REINFORCE: a run for each code, data and parameters.

- The view *Verdict and gain* (menu *Views*) has reward, recipe, seed, verdict and held-out gain as columns.
- A run's charts begin with reward and entropy over the steps. Its description has the verdict and links to its report.
- `reinforce compare` puts configurations side by side, mean and standard deviation over seeds.
- A run that says *Running* although its process is gone is ended by `reinforce track`, on the machine that it ran on.
"""


def experiment_tags() -> dict[str, str]:
    # As the pages save a view, in MLflow 3.17; a version that does not know it shows its own columns.
    state = {"selectedColumns": [*COLUMNS], "columnOrder": [*COLUMNS], "columnWidths": COLUMNS}
    view = {"name": "Verdict and gain", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    return {
        # opens MLflow's pages for training, with charts, instead of those for traces and prompts
        "mlflow.experimentKind": "custom_model_development",
        NOTE: DESCRIPTION,
        VIEW_TAG: json.dumps(view),
    }


def complete_experiment(client: "MlflowClient", experiment: str) -> None:
    """Sets the tags that an older or foreign experiment lacks, and none that is there: users edit descriptions."""
    present = client.get_experiment(experiment).tags
    for key, value in experiment_tags().items():
        if key not in present:
            client.set_experiment_tag(experiment, key, value)


def describe_run(client: "MlflowClient", run: "Run", headline: str, gain: str) -> None:
    """Write the run's description, unless it has one that is not as we wrote it."""
    report = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/{RUN_FILES.page.name}"
    note = f"{headline}\n\nHeld-out gain over the reference model: {gain}\n\n[Report]({report})"
    before = run.data.tags.get(NOTE)
    # The digest comes second: after a kill between the two, the note is found to be the one to write.
    if before is None or before == note or digest(before) == run.data.tags.get(NOTE_DIGEST):
        client.set_tag(run.info.run_id, NOTE, note)
        client.set_tag(run.info.run_id, NOTE_DIGEST, digest(note))
