"""Step 4, report: the pages. A feedback page for each submission, a marking page for each question.

A page is complete in itself and loads nothing; what students wrote is shown as text and never run.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from html import escape

from grading.assignment import Assignment, Given
from grading.repair import PICTURES, Picture
from grading.report import Mark, Marks, Result, digest_of
from grading.tables import DIGEST, ID, points_text

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
  color: #1a1a1a; background: #fff }
table { border-collapse: collapse; width: 100% }
th, td { border: 1px solid #888; padding: .3em .6em; text-align: left; vertical-align: top }
pre { background: #f3f3f3; padding: .6em; overflow-x: auto; white-space: pre-wrap }
img { max-width: 100% }
article { border-top: 2px solid #888; margin-top: 1.5em }
article.done { border-top-color: #2a7 }
button { min-width: 3em; margin-right: .3em; font: inherit }
button[aria-pressed=true] { background: #2a6; color: #fff }
header.bar { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #888;
  padding: .5em 0 }
input[type=number] { width: 5em; font: inherit } input[type=text] { width: 100%; font: inherit }
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>{style}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def html_of(title: str, body: str) -> str:
    """A whole page."""
    return PAGE.format(title=escape(title), style=STYLE, body=body)


def shown(pictures: Iterable[Picture]) -> str:
    """Pictures that a student attached, if they are of a kind that cannot run."""
    parts = []
    for name, kind, data in pictures:
        try:
            whole = base64.b64encode(base64.b64decode(data, validate=True)).decode()
        except (binascii.Error, ValueError):
            whole = ""
        if kind in PICTURES and whole:
            parts.append(f'<p><img alt="{escape(name)}" src="data:{kind};base64,{whole}"></p>')
        else:
            parts.append(f"<p>{escape(name)}: an attachment that cannot be shown.</p>")
    return "".join(parts)


def feedback(result: Result, row: Mapping[str, str], assignment: Assignment, marks: Marks) -> str:
    """The feedback page of a submission; hidden tests show their message, not their code."""
    summary = f"{row['points']} of {row['out_of']} points"
    if row["to_mark"] != "0":
        summary += f"; written answers not marked yet: {row['to_mark']}"
    parts = [f"<p>{escape(summary)}.</p>"] if not result.failed else []
    if result.failed:
        parts.append(
            "<p>It could not be graded yet. This costs you nothing; tell your instructor.</p>"
        )
    tests = "".join(
        f"<tr><td>{escape(test.id)}{' (hidden tests)' if test.hidden else ''}</td>"
        f"<td>{points_text(test.points)} of {points_text(test.out_of)}</td>"
        f"<td>{escape(test.says) or 'passed'}</td></tr>"
        for test in result.tests
    )
    parts.append(
        "<h2>Tests</h2><table><thead><tr><th scope='col'>cell</th><th scope='col'>points</th>"
        f"<th scope='col'>what happened</th></tr></thead><tbody>{tests}</tbody></table>"
    )
    if result.leaderboard:
        parts.append(f"<p>Leaderboard: {escape(row['leaderboard'])}</p>")
    if result.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
        parts.append(f"<h2>Notes</h2><ul>{notes}</ul>")
    if result.written:
        parts.append("<h2>Written answers, marked by hand</h2>")
    for question in result.written:
        parts.append(_answer(result, assignment.cell(question), marks))
    if result.remarks:
        parts.append("<h2>What else you wrote</h2>")
    for section, text in result.remarks.items():
        parts.append(f"<h3>{escape(section)}</h3><pre>{escape(text)}</pre>")
        parts.append(shown(result.pictures.get(section, [])))
    parts.append("<h2>Your code, as it was read</h2>")
    for name, code in result.code.items():
        parts.append(f"<h3>{escape(name)}</h3><pre>{escape(code) or 'Not changed.'}</pre>")
    if result.kept:
        parts.append("<h2>Cells of ours that you changed (not run)</h2>")
    for name, code in result.kept.items():
        parts.append(f"<h3>{escape(name)}</h3><pre>{escape(code)}</pre>")
    return html_of(f"{result.assignment}: {result.student}", "\n".join(parts))


def _answer(result: Result, question: Given, marks: Marks) -> str:
    """A written answer and what was given for it."""
    mark = marks.get((result.student, result.assignment, question.id), Mark(""))
    text = result.to_mark(question.id)
    points = (mark.points or "not marked yet:") if text else "0"
    comment = f"<p>{escape(mark.comment)}</p>" if mark.comment else ""
    head = f"{question.id}: {points} of {points_text(question.points)}"
    pictures = shown(result.pictures.get(question.id, []))
    return f"<h3>{escape(head)}</h3><pre>{escape(text) or 'No answer.'}</pre>{pictures}{comment}"


MARKING = """
<header class="bar"><span id="progress" role="status"></span>
<button type="button" id="save">Save marks</button></header>
<p>Click or type points. <strong>Save marks</strong> downloads <code>{file}</code>: move it into the
folder of <code>grades.csv</code> and grade again. Nothing is stored before you save.</p>
<details open><summary>Question</summary><pre>{question}</pre></details>
<details open><summary>Rubric, with answers to accept and to reject</summary>
<pre>{rubric}</pre></details>
{answers}
<script>
const common = {common};
const articles = [...document.querySelectorAll("article")];
const safe = text => /^[=+\\-@]/.test(text) ? "'" + text : text;
const quote = text => '"' + safe(text).replaceAll('"', '""') + '"';
function show() {{
  let done = 0;
  for (const a of articles) {{
    const value = a.querySelector("input[type=number]").value;
    done += value !== "";
    a.classList.toggle("done", value !== "");
    for (const b of a.querySelectorAll("button"))
      b.setAttribute("aria-pressed", value !== "" && Number(b.value) === Number(value));
  }}
  document.getElementById("progress").textContent = `${{done}} of ${{articles.length}} marked. `;
}}
let saved = true;
for (const a of articles) {{
  const input = a.querySelector("input[type=number]");
  for (const b of a.querySelectorAll("button"))
    b.addEventListener("click", () => {{ input.value = b.value; saved = false; show(); }});
  a.addEventListener("input", () => {{ saved = false; show(); }});
}}
document.getElementById("save").addEventListener("click", () => {{
  const wrong = document.querySelector("input:invalid");
  if (wrong) {{ wrong.reportValidity(); return; }}
  const lines = ["student,assignment,question,points,comment,answer"];
  for (const a of articles) {{
    const points = a.querySelector("input[type=number]").value;
    const comment = a.querySelector("input[type=text]").value;
    const row = [a.dataset.student, common.assignment, common.question, points, comment];
    if (points !== "" || comment !== "")
      lines.push([...row, a.dataset.answer].map(quote).join(","));
  }}
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], {{type: "text/csv"}}));
  link.download = common.file;
  link.click();
  saved = true;
}});
addEventListener("beforeunload", event => {{ if (!saved) event.preventDefault(); }});
show();
</script>
"""


def marking(
    question: Given, assignment: Assignment, results: Iterable[Result], marks: Marks
) -> str:
    """All answers to one question, with its rubric, and places for points and comments."""
    file = f"marks-{question.id}.csv"
    answers = []
    for result in results:
        text = result.to_mark(question.id)
        if result.assignment != assignment.name or not text:
            continue
        mark = marks.get((result.student, result.assignment, question.id), Mark(""))
        answers.append(_to_mark(result, question, text, mark, len(answers) + 1))
    common = {"assignment": assignment.name, "question": question.id, "file": file}
    body = MARKING.format(
        file=escape(file),
        question=escape(assignment.question(question.section)),
        rubric=escape(question.source),
        answers="\n".join(answers) or "<p>There are no answers.</p>",
        common=json.dumps(common),
    )
    return html_of(f"Marking {question.id} of {assignment.name}", body)


def _to_mark(result: Result, question: Given, text: str, mark: Mark, number: int) -> str:
    """One answer on a marking page."""
    steps = [points_text(i / 2) for i in range(int(2 * question.points) + 1)]
    buttons = "".join(f'<button type="button" value="{step}">{step}</button>' for step in steps)
    most = points_text(question.points)
    label = f"Points of answer {number}, 0 to {most}"
    return (
        f'<article data-student="{escape(ID + result.student)}" '
        f'data-answer="{DIGEST}{digest_of(result, question.id)}">'
        f"<h2>Answer {number}</h2><pre>{escape(text)}</pre>"
        f"{shown(result.pictures.get(question.id, []))}"
        f'<p>{buttons}<input type="number" min="0" max="{most}" step="0.25" '
        f'value="{escape(mark.points)}" aria-label="{label}"> of {most}</p>'
        f'<p><input type="text" value="{escape(mark.comment)}" placeholder="Comment" '
        f'aria-label="Comment on answer {number}"></p>'
        f"<details><summary>Whose it is</summary>{escape(result.student)}</details></article>"
    )
