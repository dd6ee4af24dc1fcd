"""The grader's steps: ingest, repair, run, report."""
