"""A JSON protocol for people: curl, and the explorer's page."""
