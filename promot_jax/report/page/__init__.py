"""`report.html`: one page that opens from disk, without network."""
