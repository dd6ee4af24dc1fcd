"""`python -m evolq_lite`."""

from evolq_lite.cli import main

raise SystemExit(main())
