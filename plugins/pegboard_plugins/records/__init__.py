"""Library for dataset authors: lines of a file by number, errors with file and line. No hooks."""
