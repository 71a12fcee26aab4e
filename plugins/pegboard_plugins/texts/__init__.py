"""Library for tokenize-fn authors: messages, chat rendering, loss spans, encoding; no hooks."""
