"""Library for tokenize-fn authors: message checks, chat rendering, loss spans, encoding; no hooks."""
