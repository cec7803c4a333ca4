"""Fuzzing: what a server, and a client, make of bytes that nobody should send; docs/fuzzing.md says how to run it."""
