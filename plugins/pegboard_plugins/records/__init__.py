"""Library for dataset and tokenize-fn authors: files of records, and forms of records. No hooks."""
