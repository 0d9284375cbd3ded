"""Protocol: HTTP requests in, OpenAI responses out. No torch."""
