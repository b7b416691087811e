"""How the flow is deployed. Nothing imports this."""
