"""The parts of the grader: source, submission, kernel, marks, report."""
