"""Sentiment of movie-review sentences, rated by people: data preparation and the MiniLM teacher."""
