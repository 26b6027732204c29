"""From the spelling of an English word to its phonemes: data preparation and a small T5 teacher."""
