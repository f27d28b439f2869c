"""The laboratory beside the core: each tool runs as `python -m tools.NAME`."""
