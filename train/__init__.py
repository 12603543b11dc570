"""The run itself: command line, loop, objectives, evaluation, tracking, report and export."""
