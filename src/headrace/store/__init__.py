"""Tables at rest: Delta-safe types, Parquet files with pinned bytes, content hashes, and atomic commits."""
