"""The studies of an evaluation as tables of text, for the Markdown report and the HTML page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rcnn.results import EvaluateResult, StudyRow


@dataclass(frozen=True)
class StudyTable:
    """A table with its heading, and a sentence on how to read it."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


COLUMNS = ("error, % (95 %)", "gain, points (95 %)", "forward passes")
ABOUT_STEPS = "The same weights with fewer recurrent steps than they were trained with."
ABOUT_EXIT = (
    "Fewer steps for images of which the network is sure, all steps for the others. Validation rows chose how sure it must be, "
    "so that their error rises by at most 0.1 points; the epoch was chosen on these rows too."
)
ABOUT_VIEWS = "Probabilities averaged over views of each image. All other figures are of the single view."
ABOUT_ROBUSTNESS = (
    "Error in per cent on corrupted images, by strength (0: as they are). A row is corrupted alike for every model."
)


def study_tables(result: EvaluateResult) -> Iterator[StudyTable]:
    """A table for each study, after that of the temperature."""
    if result.calibrated:
        yield _calibration(result)
    for name, title, about in (
        ("steps", "Recurrent steps", ABOUT_STEPS),
        ("early exit", "Early exit", ABOUT_EXIT),
        ("views", "Views", ABOUT_VIEWS),
    ):
        if rows := result.studies.get(name):
            note = f"{about} {_rows_used(result, rows)}; gain: of error, on the same rows."
            yield StudyTable(title, note, (name, *COLUMNS), [_cells(row) for row in rows])
    if rows := result.studies.get("robustness"):
        yield _robustness(rows, f"{ABOUT_ROBUSTNESS} {_rows_used(result, rows)}.")


def _rows_used(result: EvaluateResult, rows: Sequence[StudyRow]) -> str:
    return f"{rows[0].num_rows:,} of {result.num_rows:,} test rows"


def _robustness(rows: Sequence[StudyRow], note: str) -> StudyTable:
    """A row for each corruption, a column for each strength."""
    plain, *worse = rows
    lines = {row.condition.partition("/")[0]: [f"{100 * plain.error:.2f}"] for row in worse}
    for row in worse:
        lines[row.condition.partition("/")[0]].append(f"{100 * row.error:.2f}")
    strengths = map(str, range(len(next(iter(lines.values())))))
    return StudyTable("Robustness", note, ("corruption", *strengths), [(name, *cells) for name, cells in lines.items()])


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
    gain = "-" if row.passes == 1 and row.gain == 0 else f"{100 * row.gain:+.2f} ({least} to {most})"
    return (row.condition.replace("_", " "), f"{100 * row.error:.2f} ({low} to {high})", gain, f"{row.passes:.2f}")
