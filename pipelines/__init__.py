"""The pipelines, their compiled form, the local run, and the `feyntune` command."""
