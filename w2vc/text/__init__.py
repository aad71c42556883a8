"""From frames to text: the tokenizer, beam search, alignment, transcription of long recordings."""
