"""report.html: what a comparison found, as one file that needs nothing else to be looked at."""
