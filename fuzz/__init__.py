"""Fuzzing of the server and of the client with invalid bytes. docs/fuzzing.md says how to run it."""
