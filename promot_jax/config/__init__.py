"""From gin files and flags to plain arguments: `gin_files` reads, `checks` explains mistakes, `binding` builds."""
