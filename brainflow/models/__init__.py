"""Building blocks: embedding, transformer, LSTM autoencoder, heads, and how weights are saved and loaded."""
