"""From a name to a loaded model: finding, downloading, the tokenizer with its template, the weights."""
