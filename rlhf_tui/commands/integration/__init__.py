"""Commands for other programs: shells, and assistants that speak MCP."""
