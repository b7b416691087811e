"""The studies of an evaluation as tables of text, for the Markdown report and the HTML page."""

from collections.abc import Iterator
from dataclasses import dataclass

from rcnn.results import EvaluateResult, StudyRow


@dataclass(frozen=True)
class StudyTable:
    """A table with its heading, and a sentence on how to read it."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


TITLES = {
    "steps": ("Recurrent steps", "steps", "The same weights with fewer recurrent steps than they were trained with."),
    "views": ("Views", "views", "Probabilities averaged over views of each image. All other figures are of the single view."),
    "robustness": ("Robustness", "corruption and strength", "Corrupted images; a row is corrupted alike for every model."),
}  # fmt: skip
COLUMNS = ("error, % (95 %)", "gain, points (95 %)", "cost")


def study_tables(result: EvaluateResult) -> Iterator[StudyTable]:
    """A table for each study, after that of the temperature."""
    if result.calibrated:
        yield _calibration(result)
    for name, (title, first, note) in TITLES.items():
        if rows := result.studies.get(name):
            told = f"{note} {rows[0].num_rows:,} of {result.num_rows:,} test rows; gain: of error, on the same rows."
            yield StudyTable(title, told, (first, *COLUMNS), [_cells(row) for row in rows])


def _calibration(result: EvaluateResult) -> StudyTable:
    names = {"calibration_error": "calibration error, %", "brier_score": "Brier score", "loss": "loss"}

    def cells(label: str, metrics: dict[str, float]) -> tuple[str, ...]:
        factors = (100 if name == "calibration_error" else 1 for name in names)
        values = (
            f"{factor * metrics[name]:.{2 if factor == 100 else 4}f}"
            for name, factor in zip(names, factors, strict=True)
        )
        return (label, *values)

    note = (
        "Logits divided by a temperature, which was fitted to validation rows; the epoch was chosen on these rows too. Answers "
        "stay the same. `rcnn predict --calibrated` uses it."
    )
    rows = [cells("as it is", result.metrics), cells(f"temperature {result.temperature:.3f}", result.calibrated)]
    return StudyTable("Calibration", note, ("probabilities", *names.values()), rows)


def _cells(row: StudyRow) -> tuple[str, ...]:
    low, high = (f"{100 * bound:.2f}" for bound in row.error_interval)
    least, most = (f"{100 * bound:+.2f}" for bound in row.gain_interval)
    gain = f"{100 * row.gain:+.2f} ({least} to {most})" if row.gain or not _is_plain(row) else "-"
    condition = row.condition.replace("/", " ").replace("_", " ")
    return (condition, f"{100 * row.error:.2f} ({low} to {high})", gain, f"{row.passes:.2f} passes")


def _is_plain(row: StudyRow) -> bool:
    """Whether it is the model as it is, beside which there is no gain."""
    return row.gain == 0 and row.passes == 1 and "/" not in row.condition
