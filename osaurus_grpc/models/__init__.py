"""Models on disk and in memory: finding, fetching, loading."""
