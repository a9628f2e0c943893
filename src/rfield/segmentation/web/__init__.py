"""Pages of what a run has learned: the report in one file, and the page of `rfield show`."""
