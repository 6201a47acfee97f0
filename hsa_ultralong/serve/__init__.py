"""Memories behind an HTTP API: docs/serve.md."""
