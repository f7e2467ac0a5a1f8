"""Benchmark `knn`: what can be read from motion embeddings by looking at their nearest neighbours."""
