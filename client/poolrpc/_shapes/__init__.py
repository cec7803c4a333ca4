"""Shape rules, parameter checks and limits: integer arithmetic that the client and the server share."""
