"""Build, verify and describe shard sets: tar files with an index and a card (see `xcon.records`)."""
