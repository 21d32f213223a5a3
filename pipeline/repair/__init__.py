"""`clipmill check --repair`: damaged files of a dataset made again, fetched again, or dropped with a reason."""
