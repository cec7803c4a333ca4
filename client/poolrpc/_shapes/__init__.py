"""Shape rules, parameter checks and limits: integer arithmetic that client and server share."""
