"""Sound and speech: reading audio, corpora with words, phones and speakers, batches."""
