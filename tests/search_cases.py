"""Options of ``spt-fast sweep`` and ``spt-fast vtab`` for runs of seconds."""

PHOTOS = ["--pool", "avg", "--epochs", "2", "--dtype", "float32", "--workers", "0"]
