"""Stage `plot`: the run's figures (reports/figures/*.png) and its page (reports/page/report.html)."""

from typing import TYPE_CHECKING

from pipeline.errors import run_stage
from pipeline.file_io import atomic_folder, make_all_readable, write_text
from pipeline.paths import REPORTS, RUN_FILES
from pipeline.report import figures, heldout, page, style, term_report
from pipeline.report.inputs import Inputs, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(data: Inputs, narrow: bool = False) -> "dict[str, Figure]":
    """All figures by file name, in the order of the page; narrow ones are for phones."""
    history, run, held_out = data.history, data.run, data.rewards[data.trained]
    drawn = {
        "overview": figures.overview(history, held_out, run, narrow),
        "reward": figures.reward(history, held_out, run, narrow),
        "variance": figures.variance(history, run, narrow),
        "collapse": figures.collapse(history, run, narrow),
        "evaluate": heldout.evaluate(data.rewards, data.trained, run, narrow),
    }
    if data.terms:
        drawn["terms"] = term_report.terms(data.terms, run, narrow)
    if data.curve:
        best = data.diagnosis["best"]
        told = data.trained, data.diagnosis["independent"], best["step"] if best else None
        drawn["curve"] = figures.curve(data.curve, *told, run, narrow)
    for figure in drawn.values():
        style.mark_onsets(figure, [finding["onset"] for finding in data.diagnosis["findings"]])
    return drawn


def main() -> None:
    """Render everything, then write it. Raises UserError for missing or malformed inputs."""
    data = load()
    pictures, narrow = (
        {name: style.png(figure) for name, figure in draw(data, narrow).items()} for narrow in (False, True)
    )
    report = page.render(data, pictures, narrow)
    with atomic_folder(RUN_FILES.figures) as folder:
        for name, content in pictures.items():
            (folder / f"{name}.png").write_bytes(content)
    write_text(RUN_FILES.page, report)
    make_all_readable(REPORTS)  # whatever the umask; DVC has committed what it read
    print(f"{len(pictures)} figures in {RUN_FILES.figures}, page {RUN_FILES.page}")


if __name__ == "__main__":
    run_stage(main)
