"""What `limbeck peek` draws in a terminal, or writes as plain text where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from limbeck.evaluate.peek import Candidate, Peek, Position
from limbeck.report.words import number, percent, visible

TEACHER, STUDENT, FOLLOWED, SOFT = "steel_blue1", "orange3", "bold green", "bright_black"
EIGHTHS = " ▏▎▍▌▋▊▉█"
PLAIN = str.maketrans("▏▎▍▌▋▊▉█▸■→·…\u202f\u2212↵", "   #####>#>.~ -/")
"""What stands for our letters where an encoding does not have them."""

PERCENT_WIDTH = 8
LONGEST_TOKEN = 14
LEFT_CHARACTERS = 48
LESSON = (
    "Dark knowledge is the odds a teacher gives to words that did not come next; a higher "
    "temperature T flattens them until a student can learn from all of them."
)


def show(seen: Peek, paths: Sequence[str], console: Console) -> None:
    """Draw the peek with the characters that the terminal or file can encode."""
    if console.encoding.lower().startswith("utf"):
        draw(seen, paths, console)
        return
    with console.capture() as captured:
        draw(seen, paths, console)
    text = captured.get().translate(PLAIN).encode(console.encoding, "replace")
    console.file.write(text.decode(console.encoding))


def draw(seen: Peek, paths: Sequence[str], console: Console) -> None:
    """The whole peek in a terminal, or as plain text where there is none."""
    legend = Text.assemble(("■ ", TEACHER), f"teacher {visible_name(paths[0])}")
    if len(paths) > 1:
        legend.append("   ■ ", STUDENT).append(f"student {visible_name(paths[1])}")
    console.print(Text(LESSON, style="italic"))
    console.print(legend)
    before = ""
    for position in seen.positions:
        before += position.text
        console.print()
        console.print(heading(before, position))
        console.print(bars(position, seen.temperatures, console))
        if position.student_first is not None:
            console.print(student_line(position))


def visible_name(name: str) -> str:
    """A model's name, harmless in a terminal."""
    return visible(name).replace("·", " ")


def heading(before: str, position: Position) -> Text:
    """The text so far, the next token, and the teacher's entropy."""
    left = visible(before[-LEFT_CHARACTERS:]).replace("·", " ")
    line = Text("…" if len(before) > LEFT_CHARACTERS else "").append(left.lstrip(), style="bold")
    followed = next((c.text for c in position.candidates if c.followed), None)
    if followed is None:
        line.append(" ▸ ?", style=SOFT)
    else:
        word = visible(followed).replace("·", " ").lstrip() or visible(followed)
        line.append(" ▸ ", style=SOFT).append(word, style=FOLLOWED)
    nats = position.entropy[0]
    as_many = number(math.exp(nats), 0 if nats > 2 else 1)
    line.append(f"   entropy {number(nats, 2)} nats, like {as_many} equal choices", style=SOFT)
    return line


def bars(position: Position, temperatures: Sequence[float], console: Console) -> Table:
    """The candidates' probabilities at each temperature, the student's under the teacher's."""
    room = console.width - LONGEST_TOKEN - 12
    width = max(min(room // len(temperatures) - PERCENT_WIDTH - 3, 24), 3)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=SOFT)
    table.add_column("  token", width=LONGEST_TOKEN + 2, no_wrap=True, overflow="ellipsis")
    table.add_column("logit", justify="right", no_wrap=True)
    for i, temperature in enumerate(temperatures):
        nats = f"  {number(position.entropy[i], 2)} nats" if i else ""
        scale = f"\nfull = {percent(position.longest[i])}"
        table.add_column(
            f"T={temperature:g}{nats}{scale}", no_wrap=True, min_width=width + PERCENT_WIDTH
        )
    for candidate in position.candidates:
        mark = "▸ " if candidate.followed else "  "
        style = FOLLOWED if candidate.followed else ""
        token = Text.assemble((mark + visible(candidate.text), style))
        if candidate.student:
            token.append("\n    student", style=STUDENT)
        cells = [
            both_bars(candidate, i, position.longest[i], width) for i in range(len(temperatures))
        ]
        table.add_row(token, number(candidate.logit, 1), *cells)
    others = [rest(position, i, width) for i in range(len(temperatures))]
    name = "  all others" if position.student_first is None else "  all others\n    student"
    table.add_row(Text(name, style=SOFT), "", *others)
    return table


def both_bars(candidate: Candidate, at: int, longest: float, width: int) -> Text:
    """A candidate's bar at one temperature, the student's on a second line."""
    cell = one_bar(candidate.teacher[at], longest, width, TEACHER)
    if candidate.student:
        cell.append("\n").append(one_bar(candidate.student[at], longest, width, STUDENT))
    return cell


def one_bar(probability: float, longest: float, width: int, colour: str) -> Text:
    """A bar, an eighth of a letter fine, and its percentage.

    Example:
        >>> one_bar(0.25, 0.5, 5, "").plain.replace(chr(0x202F), " ")
        '██▌    25.0 %'
    """
    eighths = round(8 * width * min(probability / max(longest, 1e-30), 1.0))
    full, part = divmod(eighths, 8)
    drawn = "█" * full + (EIGHTHS[part] if part else "")
    return Text.assemble((f"{drawn:<{width}}", colour), f"{percent(probability):>{PERCENT_WIDTH}}")


def rest(position: Position, at: int, width: int) -> Text:
    """Total probability of the tokens that are not shown."""
    text = f"{'':<{width}}{percent(position.rest_teacher[at]):>{PERCENT_WIDTH}}"
    if position.rest_student:
        text += f"\n{'':<{width}}{percent(position.rest_student[at]):>{PERCENT_WIDTH}}"
    return Text(text, style=SOFT)


def student_line(position: Position) -> Text:
    """The student's most probable token, and its KL from the teacher."""
    assert position.student_first is not None
    line = Text("  student first: ", style=SOFT)
    line.append(visible(position.student_first), style=STUDENT)
    apart = " → ".join(number(kl, 2) for kl in position.forward_kl)
    text = f" {percent(position.student_probability)}   forward KL {apart} nats"
    return line.append(text, style=SOFT)
