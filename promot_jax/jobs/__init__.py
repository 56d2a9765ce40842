"""What a user can run, one file per job: plain functions of plain settings, which `main` binds from gin files."""
