"""PURE: an accuracy report as a table that people read (Markdown)."""

from collections.abc import Iterable

from serve.artifacts.certificates import AccuracyReport, Estimate, GateCheck


def to_markdown(report: AccuracyReport) -> str:
    """Return the report as Markdown."""
    verdict = "passed" if report.passed else "REFUSED"
    lines = [
        f"# Accuracy: {verdict}",
        "",
        f"- reference: {report.reference}",
        f"- candidate: {report.candidate}",
        f"- {report.texts} texts, {report.tokens} predicted tokens",
        "",
    ]
    if report.reasons:
        lines += ["Refused because", "", *(f"- {reason}" for reason in report.reasons), ""]
    lines += _table(("figure", "reference", "candidate", "difference"), _figures(report))
    lines += _table(("gate", "measured", "limit", "verdict"), map(_check, report.checks))
    hints = [check.hint for check in report.checks if check.hint]
    hints += [check.reason for check in report.checks if check.passed and check.reason]
    if hints:
        lines += ["Not certain", "", *(f"- {hint}" for hint in hints), ""]
    if report.notes:
        lines += ["Notes", "", *(f"- {note}" for note in report.notes), ""]
    return "\n".join(lines)


def _figures(report: AccuracyReport) -> Iterable[tuple[str, ...]]:
    for task in report.tasks:
        accuracy = f"accuracy, {task.name} ({task.metric}, {task.reference.samples})"
        yield accuracy, _percent(task.reference), _percent(task.candidate), f"drop {_percent(task.drop)}"
    if report.perplexity_ratio is not None:
        sides = [f"{value:.4g}" for value in (report.reference_perplexity, report.candidate_perplexity) if value]
        yield "perplexity", *sides, f"ratio {_number(report.perplexity_ratio)}"
    if report.kl_divergence is not None:
        yield "KL divergence, nats a token", "", "", _number(report.kl_divergence)
    if report.greedy_agreement is not None:
        yield "greedy tokens that agree", "", "", _percent(report.greedy_agreement)
    if report.same_outputs is not None:
        yield "continuations that are the same", "", "", _percent(report.same_outputs)


def _check(check: GateCheck) -> tuple[str, ...]:
    if check.measured is None:
        measured, limit = "not measured", f"{check.limit:g}"
    elif "accuracy" in check.name:
        measured, limit = _percent(check.measured), f"{100 * check.limit:g} %"
    else:
        measured, limit = _number(check.measured), f"{check.limit:g}"
    sure = "" if check.certain else ", not certain"
    return (
        check.name,
        measured,
        f"at {'least' if check.at_least else 'most'} {limit}",
        f"{'passed' if check.passed else 'REFUSED'}{sure}",
    )


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.2f} % ({100 * estimate.low:.2f} to {100 * estimate.high:.2f})"


def _number(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [head, *rows]
    if len(cells) == 1:
        return []
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:], ""]
