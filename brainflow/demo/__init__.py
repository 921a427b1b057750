"""The whole way on real data that ships with the package: store, pretraining, decoding."""
